"""Data: from a name to batches of tokens."""
