"""Hostile files for everything that sborax reads. Run by `scripts/fuzz.py`."""
