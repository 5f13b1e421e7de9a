"""Parses untrusted JSON files within limits, and refuses files beyond these with an error of one line."""

import json
import os
import reprlib
import sys
from typing import Any, TypeGuard

from etils import epath

from sborax.adapters.core import SboraxError

LARGEST = 1 << 26
"""The most bytes of a document. The index of a large model has a few million."""
DEEPEST = 100
"""The most levels of nested lists and objects."""

shown = reprlib.repr
"""A value, shortened, for an error."""


def parse(text: str | bytes, where: str) -> Any:
    """The value of a JSON document, which `where` names in errors.

    Raises SboraxError for text that is not JSON, is nested more than `DEEPEST` levels, or repeats a key of an object.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise SboraxError(f"{where}: nested too deeply") from None
    # A JSONDecodeError, bytes in another encoding, a repeated key, or a number of thousands of digits.
    except ValueError as failure:
        raise SboraxError(f"{where}: not JSON ({failure})") from None
    level, inner = 0, [value]
    while inner := [item for node in inner if isinstance(node, (dict, list)) for item in _items(node)]:
        level += 1
        if level > DEEPEST:
            raise SboraxError(f"{where}: nested too deeply")
    return value


def check_plain(file: epath.PathLike) -> None:
    """Raise SboraxError for a path that exists and is not a regular file: reading a pipe or a device may never end."""
    # By `os` and not epath, which counts everything but directories as files. Remote paths do not exist for `os`.
    if os.path.exists(file) and not os.path.isfile(file):
        raise SboraxError(f"{file}: not a regular file")


def read_object(file: epath.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises SboraxError for a file of more than `LARGEST` bytes, for a value that is no object, and as `check_plain` and
    `parse` do.
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


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of JSON is a number that a float can hold. Booleans are none."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} is given twice")
    return unique


def _items(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
