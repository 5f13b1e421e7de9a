"""Hostile files for everything that sborax reads; `scripts/fuzz.py` is the way in."""
