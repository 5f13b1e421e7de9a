"""One strict codec for every config: frozen dataclasses to JSON and back, and dotted `key=value` changes.

The type annotations are the schema. Where a field has an abstract type (a method, a rank policy), the value is written
with the name of its class, `{"type": "LoRA", "rank": 8}`; a class outside sborax has its module in the name,
`{"type": "mine:LoRA"}`. A slice is written as `{"slice": [start, stop, step]}`.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import sborax.methods  # noqa: F401  (a method is found by name among the classes that exist)
import sborax.methods.masked  # noqa: F401
from sborax.adapters.core import SboraxError
from sborax.adapters.stripped import STRIPPED
from sborax.config.classes import concrete, find_class, is_builtin, is_known, is_offered, name_of, source_of
from sborax.config.documents import DEEPEST, shown
from sborax.config.schema import in_words

T = TypeVar("T")


class Literal(str):
    """The text on the right side of `key=value`. The type of the field decides how it is parsed."""


@dataclasses.dataclass(frozen=True)
class LiveObject:
    """A value that was given in Python and that no file can hold, such as a function.

    - description: what a file keeps of it.
    - value: None if it was read from a file.
    """

    description: str
    value: Any = dataclasses.field(default=None, compare=False)

    def require(self, where: str) -> Any:
        """The value. Raises SboraxError, naming the field `where`, if there is only the description."""
        if self.value is None:
            raise SboraxError(
                f"{where}: was given in Python ({self.description}), which no config.json holds; "
                f"give it again in Python, or set {where}=..."
            )
        return self.value

    def label(self) -> str:
        """The description."""
        return self.description


GIVEN = "given_in_python"
"""The key of a `LiveObject`'s description in a file."""


def encode(value: Any) -> Any:
    """A config as JSON values. `decode` of them equals `value`, except for the values of `LiveObject`s."""
    return _encode(value, lambda live: {GIVEN: live.description})


def _encode(value: Any, live: Callable[[LiveObject], Any]) -> Any:
    if isinstance(value, LiveObject):
        return live(value)
    if value is STRIPPED:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = {field.name: _encode(getattr(value, field.name), live) for field in dataclasses.fields(value)}
        if _family(kind):
            return {"type": name_of(kind), **fields}
        if not is_builtin(kind) and any(map(_is_final, kind.__mro__[1:])):
            raise SboraxError(f"a config cannot hold {name_of(kind)}: {kind.__mro__[1].__name__} is not to be extended")
        return fields
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, tuple | list):
        return [_encode(item, live) for item in value]
    if isinstance(value, Mapping):
        return {name: _encode(item, live) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise SboraxError(f"a config cannot hold a {type(value).__name__}: {shown(value)}")


def _is_final(kind: type) -> bool:
    return is_builtin(kind) and dataclasses.is_dataclass(kind)


def sources(value: Any) -> Iterator[str]:
    """The arguments of `--import` for all classes in a config that sborax does not define."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if not is_builtin(type(value)):
            yield source_of(type(value))
        value = tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    if isinstance(value, tuple | list):
        for item in value:
            yield from sources(item)


def decode(kind: type[T], value: Any, where: str = "", *, structural: bool = False) -> T:
    """A config from JSON values.

    - kind: the class of the config.
    - where: the place of the value, for errors.
    - structural: for the method of an attached adapter: a hyper-parameter that is null or missing is `STRIPPED`.

    Raises SboraxError, naming the key, for an unknown or missing key, a value of the wrong type, or an unknown class.
    """
    return _decode(kind, value, where, structural)


def override(config: T, changes: Sequence[str]) -> T:
    """A config with dotted changes, such as `optimizer.lr=1e-4` or `rules.0.method.rank=8`.

    All changes are made before the result is checked. `*` stands for every entry of a list: `rules.*.method.alpha=16`.
    A mapping may be written as `mesh=fsdp=4,tensor=2`.
    Raises SboraxError for a change without `=`, an unknown key (similar ones are listed), or a value of the wrong type.
    """
    raw = _encode(config, lambda live: live)
    mappings = [name for name, kind in typing.get_type_hints(type(config)).items() if _is_mapping(kind)]
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise SboraxError(f"{change!r}: write key=value, such as optimizer.lr=1e-4")
        name, _, entry = key.partition(".")
        if entry and name in mappings and not isinstance(raw[name], Literal):
            # A mapping may get any key, and may have been null.
            raw[name] = {**(raw[name] or {}), entry: Literal(text)}
            continue
        for full_key in _spelled(raw, key):
            _assign(raw, full_key, Literal(text))
    return _decode(type(config), raw, "", False)


def _assign(raw: Any, key: str, value: Literal) -> None:
    *parents, last = key.split(".")
    node, done = raw, []
    for part in parents:
        node = node[_index(node, part, done)]
        done.append(part)
        if isinstance(node, Literal):
            raise SboraxError(f"{key}: {'.'.join(done)} is given as a whole by another change")
    node[_index(node, last, done)] = value


def _spelled(raw: Any, key: str) -> list[str]:
    """The keys that a key with `*` stands for: each `*` becomes every index of its list."""
    before, star, after = f".{key}.".partition(".*.")
    if not star:
        return [key]
    node, done = raw, []
    for part in before.split(".")[1:]:
        node = node[_index(node, part, done)]
        done.append(part)
    if not isinstance(node, list):
        raise SboraxError(f"{key}: {'.'.join(done) or 'a config'} is no list, so * stands for nothing")
    keys = (".".join([*done, str(number), *after.split(".")[:-1]]) for number in range(len(node)))
    return [spelled for full_key in keys for spelled in _spelled(raw, full_key)]


def _index(node: Any, part: str, done: list[str]) -> Any:
    where = ".".join(done)
    if isinstance(node, list):
        if part in (numbers := [str(number) for number in range(len(node))]):
            return numbers.index(part)
        raise SboraxError(f"{where}.{part}: {where} has {len(node)} entries, numbered from 0")
    if not isinstance(node, dict):
        raise SboraxError(
            f"{'.'.join([*done, part])}: {where} is {json.dumps(node, default=_described)} and has no keys; "
            "set it as a whole"
        )
    if part not in node or part == "type":
        raise SboraxError(_unknown(".".join([*done, part]), part, [name for name in node if name != "type"]))
    return part


def _unknown(where: str, name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(names)) or 'none'}"
    return f"{where}: unknown key; {hint}"


def _family(kind: type) -> type | None:
    """The topmost abstract class of sborax that `kind` extends, if any."""
    bases = [base for base in kind.__mro__[1:] if is_builtin(base) and inspect.isabstract(base)]
    return bases[-1] if bases else None


def entries(text: str) -> dict[str, Literal] | None:
    """`fsdp=4,tensor=2` as a mapping; None for text of another form."""
    pairs = [[side.strip() for side in part.split("=", 1)] for part in text.split(",")]
    if not all(len(pair) == 2 and pair[0].isidentifier() for pair in pairs):
        return None
    return {name: Literal(value) for name, value in pairs}


def _is_mapping(kind: Any) -> bool:
    return dict in (typing.get_origin(part) for part in (kind, *typing.get_args(kind)))


def _decode(kind: Any, value: Any, where: str, structural: bool) -> Any:
    if kind is LiveObject:
        return value if isinstance(value, LiveObject) else LiveObject(str(value[GIVEN]))
    origin = typing.get_origin(kind)
    if isinstance(value, Literal) and _is_mapping(kind):
        named = entries(value)
        value = value if named is None else named
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(kind), value, where, structural)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        plain = str(value) if isinstance(value, Literal) else value
        if plain not in choices or isinstance(plain, bool):
            raise SboraxError(f"{where}: must be one of {', '.join(map(repr, choices))}, got {plain!r}")
        return plain
    if isinstance(value, Literal):
        return str(_unquote(value)) if kind is str else _decode(kind, _parse(value), where, structural)
    if origin is Sequence:
        return _decode_tuple((*typing.get_args(kind), ...), value, where, structural)
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), value, where, structural)
    if origin is dict or kind is dict:
        if not isinstance(value, dict):
            raise _wrong_type(where, in_words(kind), value)
        item = (typing.get_args(kind) or (str, Any))[1]
        return {name: _decode(item, entry, f"{where}.{name}", structural) for name, entry in value.items()}
    if kind is slice:
        parts = value.get("slice") if isinstance(value, dict) and set(value) == {"slice"} else None
        if not isinstance(parts, list) or len(parts) != 3:
            raise _wrong_type(where, in_words(kind), value)
        if any(part is not None and type(part) is not int for part in parts) or parts[2] == 0:
            raise _wrong_type(where, '{"slice": [start, stop, step]} of whole numbers, the step not 0', value)
        return slice(*parts)
    if isinstance(kind, type) and (inspect.isabstract(kind) or _family(kind)):
        return _decode_one_of(kind, value, where, structural)
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, value, where, structural)
    return _decode_scalar(kind, value, where)


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if kind is None or kind is types.NoneType:
        if value is not None:
            raise _wrong_type(where, "null", value)
        return None
    if kind is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:
            raise _wrong_type(where, "a finite number", value)
        return float(value)
    if type(value) is not kind:
        raise _wrong_type(where, in_words(kind), value)
    return value


def _decode_union(kinds: Sequence[Any], value: Any, where: str, structural: bool) -> Any:
    """A value of a union. Exact types come first, so that an int stays an int in `int | float`; text comes last."""
    if isinstance(value, Literal):
        parsed = _parse(value)
        if str in kinds and (isinstance(parsed, str) or not any(_fits(kind, parsed) for kind in kinds)):
            return str(_unquote(value))
        value = parsed
    fitting = [kind for kind in kinds if _fits(kind, value)]
    words = [in_words(kind) for kind in kinds if kind is not LiveObject and in_words(kind)]
    # A word that is no class's name may be meant as another type of the union, so the error lists them all.
    choice = len([kind for kind in kinds if kind is not types.NoneType]) > 1 and isinstance(value, str)
    if not fitting or (choice and inspect.isabstract(fitting[0]) and not is_known(fitting[0], value)):
        raise _wrong_type(where, " or ".join(words), value)
    return _decode(fitting[0], value, where, structural)


def _fits(kind: Any, value: Any) -> bool:
    """Whether `value` has the outer form of `kind`, which is enough to choose a member of a union."""
    origin = typing.get_origin(kind)
    if isinstance(value, LiveObject) or (isinstance(value, dict) and set(value) == {GIVEN}):
        return kind is LiveObject
    if kind is LiveObject:
        return False
    if kind is Any:
        return True
    if kind is types.NoneType:
        return value is None
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin is tuple or (origin is Sequence and in_words(kind)):
        return isinstance(value, list | tuple)
    if kind is slice:
        return isinstance(value, dict) and set(value) == {"slice"}
    if origin is dict:
        return isinstance(value, dict)
    if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or inspect.isabstract(kind)):
        named = inspect.isabstract(kind) or _family(kind) is not None
        return isinstance(value, str if named and isinstance(value, str) else dict) and value != {"slice"}
    return type(value) is kind or (kind is float and type(value) is int)


def _decode_tuple(items: tuple[Any, ...], value: Any, where: str, structural: bool) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong_type(where, in_words(tuple[items]), value)
    kinds = [items[0]] * len(value) if items[-1:] == (...,) else list(items)
    if len(kinds) != len(value):
        raise SboraxError(f"{where}: needs {len(kinds)} entries, got {len(value)}")
    return tuple(
        _decode(kind, item, f"{where}.{number}", structural)
        for number, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _decode_one_of(kind: type, value: Any, where: str, structural: bool) -> Any:
    if isinstance(value, str):
        value = {"type": value}
    if isinstance(value, dict) and "type" not in value and inspect.isabstract(kind):
        # The name may be left out if sborax has only one class of the kind.
        builtin = [child for child in concrete(kind) if is_builtin(child)]
        value = {"type": name_of(builtin[0]), **value} if len(builtin) == 1 else value
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        names = sorted(name_of(child) for child in concrete(kind) if is_offered(child))
        raise _wrong_type(where, f'an object with "type", one of {", ".join(names)}', value)
    fields = {key: item for key, item in value.items() if key != "type"}
    return _decode_fields(find_class(kind, value["type"], where), fields, where, structural)


def _decode_fields(kind: Any, value: Any, where: str, structural: bool) -> Any:
    if not isinstance(value, dict):
        raise _wrong_type(where or "config", in_words(kind), value)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for name in value:
        if name not in fields:
            raise SboraxError(_unknown(prefix + name, name, list(fields)))
    values = {}
    for name, field in fields.items():
        if structural and field.metadata.get("hyper") and value.get(name) is None:
            values[name] = STRIPPED
        elif name in value:
            values[name] = _decode(hints[name], _with_type(field, value[name]), prefix + name, structural)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SboraxError(f"{prefix}{name}: missing")
    if structural:
        # As `core.structure` makes it: the constructor would check values.
        bare = object.__new__(kind)
        for name, item in values.items():
            object.__setattr__(bare, name, item)
        return bare
    try:
        return kind(**values)
    except SboraxError as error:
        raise SboraxError(f"{where}: {error}" if where else str(error)) from None


def _with_type(field: dataclasses.Field, value: Any) -> Any:
    """`value`; an object without "type" gets that of the field's default, if the default extends an abstract class."""
    default, plain = type(field.default), _parse(value) if isinstance(value, Literal) else value
    if _family(default) is None or not isinstance(plain, dict) or {"type", GIVEN} & plain.keys():
        return value
    return {"type": name_of(default), **plain}


def _parse(text: Literal) -> Any:
    """The value of a Python or JSON literal. Anything else is text, also a value that a config cannot hold (a set)."""
    if _depth(text) > DEEPEST:
        return str(text)
    for read in (ast.literal_eval, json.loads):
        try:
            value = read(str(text))
        # Python's parser raises any of these.
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if not _storable(value):
            continue
        return list(value) if isinstance(value, tuple) else value
    return str(text)


def _depth(text: str) -> int:
    """The most brackets that are open at once, including those in quotes."""
    steps = (1 if letter in "([{" else -1 for letter in text if letter in "([{)]}")
    return max(itertools.accumulate(steps), default=0)


def _storable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _storable(item) for name, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_storable, value))
    if isinstance(value, int):
        # Python does not print integers of thousands of digits.
        return value.bit_length() <= 1024
    return value is None or isinstance(value, float | str)


def _unquote(text: Literal) -> Any:
    """The text as it is, without quotes around it."""
    value = _parse(text)
    return value if isinstance(value, str) else str(text)


def _described(value: Any) -> str:
    """A value that JSON cannot hold, for an error."""
    return value.label() if isinstance(value, LiveObject) else shown(value)


def _wrong_type(where: str, expected: str, value: Any) -> SboraxError:
    text = value if isinstance(value, Literal) else json.dumps(value, default=_described)
    return SboraxError(f"{where}: must be {expected}, got {text}")
