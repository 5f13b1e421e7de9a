"""Where arrays lie: meshes, shardings, hosts, and the state of a run."""
