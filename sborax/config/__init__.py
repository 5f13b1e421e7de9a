"""Configs and documents as text: read within bounds, written strictly."""
