"""The memory and traffic of a run, without its devices."""
