"""Files of a run directory: adapters, checkpoints, metrics, locks."""
