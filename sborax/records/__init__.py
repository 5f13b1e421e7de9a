"""What a run directory holds: adapters, checkpoints, metrics, locks."""
