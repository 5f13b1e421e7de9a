"""PEFT's rules for choosing modules, and the config fields that choose a given set of modules."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sborax.adapters.core import SboraxError
from sborax.adapters.patterns import compiled, fullmatch, match
from sborax.interop.peft_layout import EMBEDDING, HEAD

Value = TypeVar("Value")

NUMBERED = re.compile(r".*?\.[^.]*\.(\d+)\.")
MOST_QUANTIFIERS = 4
MOST_GROUPS = 4


def _checked(pattern: Any, field: str) -> str:
    """Return `pattern`. Raise SboraxError unless it is a regular expression that takes no exponential time."""
    if not isinstance(pattern, str):
        raise SboraxError(f"{field}: expected text, got {str(pattern)[:40]}")
    heavy = (
        len(pattern) > 4000
        or len(re.findall(r"[*+?{]", pattern)) > MOST_QUANTIFIERS + pattern.count("(?")
        or pattern.count("(") > MOST_GROUPS
        or re.search(r"\)\s*[*+{]", pattern)
        # No flags: most must stand at the start, where PEFT's own pattern already is, and (?x) allows comments.
        or re.search(r"\(\?[aiLmsux]", pattern)
    )
    if heavy:
        raise SboraxError(f"{field}: the pattern {pattern[:60]!r} is too complex to be run; list the modules by name")
    try:
        compiled(pattern)
    except SboraxError as failure:
        raise SboraxError(f"{field}: {failure}") from None
    return pattern


def _texts(config: Mapping[str, Any], field: str) -> list[str]:
    value = config.get(field) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SboraxError(f"{field}: expected a list of names, got {str(value)[:60]}")
    return value


def _named(module: str, names: Sequence[str]) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)


def _covers_layer(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    layers = layers if isinstance(layers, list) else [layers]
    if not all(type(number) is int for number in layers):
        raise SboraxError(f"layers_to_transform: expected layer numbers, got {str(layers)[:60]}")
    below = config.get("layers_pattern") or []
    below = below if isinstance(below, list) else [below]
    patterns = [rf"(?:^|.*?\.){_checked(name, 'layers_pattern')}\.(\d+)\." for name in below] or [NUMBERED.pattern]
    first = next((result for pattern in patterns if (result := match(pattern, module))), None)
    return first is not None and int(first[first.re.groups]) in layers


def saved_modules(config: Mapping[str, Any], modules: Sequence[str]) -> list[str]:
    """The modules whose base weights PEFT stores: `modules_to_save`. Raises SboraxError for one that is missing."""
    names = _texts(config, "modules_to_save")
    for name in names:
        if not any(module.endswith(name) for module in modules):
            raise SboraxError(f"modules_to_save: this model has no module {name[:60]!r}")
    return [module for module in modules if any(module.endswith(name) for name in names)]


def targeted(config: Mapping[str, Any], linear: Sequence[str]) -> list[str]:
    """The modules among `linear` that PEFT adapts under `config`, in the order given."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if not targets:
        raise SboraxError("target_modules is empty: the config does not say which modules are adapted")
    saved = _texts(config, "modules_to_save")

    def is_target(module: str) -> bool:
        if isinstance(excluded, str):
            if fullmatch(_checked(excluded, "exclude_modules"), module):
                return False
        elif _named(module, _texts(config, "exclude_modules")):
            return False
        if any(f".{name}." in f".{module}." for name in saved):
            return False
        if targets == "all-linear":
            return module not in (EMBEDDING, HEAD)
        if isinstance(targets, str):
            return fullmatch(_checked(targets, "target_modules"), module) is not None
        names = _texts(config, "target_modules")
        # A module named in full is adapted whatever its layer.
        return module in names or (_named(module, names) and _covers_layer(config, module))

    return [module for module in linear if is_target(module)]


def matched(config: Mapping[str, Any], field: str, module: str) -> bool:
    """Whether a field such as `feedforward_modules` chooses a module: it is a pattern, or a list of name endings."""
    targets = config.get(field) or []
    if isinstance(targets, str):
        return fullmatch(_checked(targets, field), module) is not None
    return any(module.endswith(name) for name in _texts(config, field))


def value_for(config: Mapping[str, Any], field: str, module: str, default: Any, form: str = r"(.*\.)?({})$") -> Any:
    """The value of one module in a field such as `rank_pattern`: that of the first key that matches, as in PEFT.

    Args:
    - config: the config.
    - field: the field that holds the patterns, `{key: value}`.
    - module: the module's full name, which is looked up last.
    - default: the value if no key matches.
    - form: the regular expression into which a key is put.
    """
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise SboraxError(f"{field}: expected an object, got {str(patterns)[:60]}")
    for key, value in patterns.items():
        if match(form.replace("{}", _checked(key, field)), module):
            return value
    return patterns.get(module, default)


def naming(modules: Sequence[str], linear: Sequence[str], layered: bool = True) -> dict[str, Any]:
    """The shortest config fields with which PEFT adapts exactly `modules` among `linear`.

    layered: whether the config may choose layers by number.
    """
    short = sorted({module.rpartition(".")[2] for module in modules})
    layers = sorted({int(match[1]) for module in modules if (match := NUMBERED.match(module))})
    candidates: list[dict[str, Any]] = [
        {"target_modules": short},
        *([{"target_modules": short, "layers_to_transform": layers}] if layered else []),
        {"target_modules": sorted(modules)},
    ]
    return next(fields for fields in candidates if set(targeted(fields, linear)) == set(modules))


def pattern_for(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """`(default, exceptions)`: the commonest value, and PEFT's patterns for the modules that have another.

    Exceptions are short names where all layers agree (`self_attn.q_proj`), and full names otherwise.
    """
    default = Counter(values.values()).most_common(1)[0][0]
    kinds: dict[str, set[Value]] = {}
    for module, value in values.items():
        kinds.setdefault(_kind(module), set()).add(value)
    exceptions = {}
    for module, value in values.items():
        uniform = kinds[_kind(module)] == {value}
        if value != default:
            exceptions[_kind(module) if uniform else module] = value
    return default, exceptions


def _kind(module: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `self_attn.q_proj`."""
    match = NUMBERED.match(module)
    return module[match.end() :] if match else module
