"""JSON out of files that others wrote: parsed within bounds, or refused in one line."""

import json
import os
import reprlib
from typing import Any

from etils import epath

from sborax.adapters.core import SboraxError

LARGEST = 1 << 26
"""Bytes of the largest document that is read whole; the index of a large model has a few million."""
DEEPEST = 100
"""Levels of lists and objects within each other."""

shown = reprlib.repr
"""A value as an error shows it, shortened."""


def parse(text: str | bytes, where: str) -> Any:
    """What a JSON document says; `where` names it in errors.

    Raises SboraxError for what is no JSON, nested more than `DEEPEST` levels, or says one key of an object twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise SboraxError(f"{where}: nested too deeply") from None
    # Besides JSON's own: bytes in no encoding of it, and numbers of thousands of digits.
    except ValueError as failure:
        raise SboraxError(f"{where}: not JSON ({failure})") from None
    level, inner = 0, [value]
    while inner := [item for one in inner if isinstance(one, (dict, list)) for item in _items(one)]:
        level += 1
        if level > DEEPEST:
            raise SboraxError(f"{where}: nested too deeply")
    return value


def check_plain(file: epath.PathLike) -> None:
    """Raise SboraxError for what has a name and is no file: a pipe keeps its reader waiting, a device never ends."""
    # Not by epath, for which whatever is no directory is a file; what is not on this machine is neither.
    if os.path.exists(file) and not os.path.isfile(file):
        raise SboraxError(f"{file}: not a regular file")


def read_object(file: epath.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises SboraxError for a file beyond `LARGEST` bytes, for another kind of value, and as `check_plain` and `parse`.
    """
    path = epath.Path(file)
    check_plain(path)
    size = path.stat().length
    if size > LARGEST:
        raise SboraxError(f"{path}: has {size:,} bytes, more than the {LARGEST:,} that are read")
    value = parse(path.read_bytes(), str(path))
    if not isinstance(value, dict):
        raise SboraxError(f"{path}: not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} is given twice")
    return found


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
