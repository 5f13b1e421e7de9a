"""Other libraries' file formats, and smaller or approximately merged models."""
