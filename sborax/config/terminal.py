"""What is printed: names and texts out of strangers' files, without the letters that a terminal would obey."""

import re
import sys
from typing import Any

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but the line break and the tab, breaks and directions of Unicode, halves of surrogate pairs."""


def visible(text: str) -> str:
    """The text with every letter of `UNSAFE` written out, as Python writes it: an escape becomes `\\x1b`."""
    return UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: object, *, end: str = "\n", file: Any = None) -> None:
    """Print a line of this program's own, at once. Names in it may be anybody's, so it is made visible everywhere."""
    print(visible(str(text)), end=end, file=file, flush=True)


def print_text(text: str) -> None:
    """Print a model's text, without a line break: visible on a terminal, letter by letter into a file or a pipe."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)
