"""Describes the types of config fields in words, with examples."""

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from sborax.config.classes import concrete, is_offered, name_of

PLAIN = {
    types.NoneType: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    slice: '{"slice": [start, stop, step]}',
}
EXAMPLES = {bool: True, int: 8, float: 0.5, str: "text"}


def in_words(kind: Any) -> str:
    """A description of a type's values, for an error; empty for a type that a file cannot hold."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    if origin is typing.Literal:
        return " or ".join(map(json.dumps, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(filter(None, map(in_words, inner)))
    if origin is tuple or origin is Sequence:
        if inner and typing.get_origin(inner[0]) is Mapping:
            return ""
        items = list(inner[:1] if origin is Sequence or inner[-1:] == (...,) else inner)
        example = [value for item in items if (value := _example(item)) is not None]
        return f"a list such as {json.dumps(example)}" if items and len(example) == len(items) else "a list"
    if origin is dict or kind is dict:
        example = _example((inner or (str, Any))[1])
        return "an object" if example is None else f"an object such as {json.dumps({'name': example})}"
    if isinstance(kind, type) and inspect.isabstract(kind):
        names = sorted(name_of(child) for child in concrete(kind) if is_offered(child))
        return f"one of {', '.join(names)}"
    if dataclasses.is_dataclass(kind):
        return _fields_in_words(kind)
    return ""


def _fields_in_words(kind: Any) -> str:
    first = dataclasses.fields(kind)[0].name
    return f"an object with keys of {kind.__name__}, such as {{{json.dumps(first)}: ...}}"


def _example(kind: Any) -> Any:
    """An example value of a type, as JSON; None for a type without a short one."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)[0]
    return EXAMPLES.get(kind) if isinstance(kind, type) else None
