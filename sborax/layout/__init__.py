"""Where arrays lie: meshes, shardings, hosts, and what a step holds."""
