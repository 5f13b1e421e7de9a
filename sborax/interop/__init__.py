"""Doors to other libraries' files."""
