"""Regular expressions from configs, matched within a time limit, since a hostile one may take forever."""

import functools
import re
from typing import Any

import regex

from sborax.adapters.core import SboraxError

SECONDS = 0.2
"""Time limit per match, in seconds."""
LENGTH = 2**16
"""Length limit of a pattern, in characters. A list of all modules of a large model has a third of it."""


@functools.lru_cache(4096)
def compiled(pattern: str) -> Any:
    """A pattern of `re`, compiled by `regex`, whose matches can have a time limit.

    Raises SboraxError for an invalid pattern, and for one longer than `LENGTH`, since compiling has no time limit.
    """
    if len(pattern) > LENGTH:
        raise SboraxError(f"the pattern {pattern[:60]!r}... has {len(pattern):,} characters; {LENGTH:,} are the most")
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as failure:
        raise SboraxError(f"{pattern[:60]!r} is not a regular expression ({failure})") from None


def search(pattern: str, text: str) -> bool:
    """Whether `re.search` finds the pattern. Raises SboraxError for a pattern that takes too long."""
    return _timed(compiled(pattern).search, pattern, text) is not None


def fullmatch(pattern: str, text: str) -> Any:
    """As `re.fullmatch`. Raises SboraxError for a pattern that takes too long."""
    return _timed(compiled(pattern).fullmatch, pattern, text)


def match(pattern: str, text: str) -> Any:
    """As `re.match`. Raises SboraxError for a pattern that takes too long."""
    return _timed(compiled(pattern).match, pattern, text)


def _timed(find: Any, pattern: str, text: str) -> Any:
    try:
        return find(text, timeout=SECONDS)
    except (TimeoutError, MemoryError):
        raise SboraxError(f"the pattern {pattern[:60]!r} takes too long on {text!r}; write it simpler") from None
