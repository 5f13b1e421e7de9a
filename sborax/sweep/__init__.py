"""Several runs at once over one base."""
