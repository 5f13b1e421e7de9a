"""Prints text from strangers' files with control characters made visible, so that a terminal does not obey them."""

import re
import sys
from typing import Any

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except line break and tab, Unicode's line breaks and directions, and unpaired surrogates."""


def visible(text: str) -> str:
    """The text with every character of `UNSAFE` as a Python escape: ESC becomes `\\x1b`."""
    return UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def say(text: object, *, end: str = "\n", file: Any = None) -> None:
    """Print a line at once, with control characters made visible: names in it may come from strangers' files."""
    print(visible(str(text)), end=end, file=file, flush=True)


def print_text(text: str) -> None:
    """Print a model's text without a line break: with visible control characters on a terminal, else unchanged."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)
