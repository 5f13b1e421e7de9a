"""The command `sborax`."""

from sborax.cli.main import main

__all__ = ["main"]
