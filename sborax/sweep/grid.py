"""A sweep: an experiment, and a grid of values for some of its fields. Every combination is a member."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.adapters.paths import as_rules
from sborax.config.codec import encode, entries, override
from sborax.config.documents import parse
from sborax.data.options import at_least
from sborax.train.experiment import Experiment
from sborax.train.optimizer import AbstractOptimizer

MAY_VARY = (
    "rules",
    "optimizer",
    "steps",
    "epochs",
    "batch_size",
    "accumulate",
    "procedure",
    "hint_batches",
    "seed_data",
    "seed_adapter",
    "train_base",
    "train_also",
    "imports",
)
"""Fields of an experiment in which members may differ. The others say what the base is, or how members are compared."""

MOST = 512
"""The most members that a sweep may have."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    - name: the values that it does not share with all others, as a directory name: `lr=1e-4,seed_adapter=1`.
    - changes: `key=value` for every key of the grid.
    - experiment: the sweep's experiment with these changes.
    """

    name: str
    changes: tuple[str, ...]
    experiment: Experiment


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Several runs over one base that share model and data. Those that are alike share a program (`groups.grouped`).

    Args:
    - experiment: what all members have in common.
    - grid: values by dotted key, `{"optimizer.lr": (1e-4, 3e-4), "seed_adapter": (0, 1)}`; every combination is a
      member. A text is read as on the command line.
    - at_once: how many members of a program a step computes together, by `vmap`; so many at a time follow one another,
      by `lax.map`. More need more memory for activations. None (default): one on a CPU, all elsewhere.

    Raises SboraxError for a grid without alternatives, with a value given twice, or with more than 512 members.
    """

    experiment: Experiment
    grid: Mapping[str, Sequence[Any]]
    at_once: int | None = None

    def __post_init__(self) -> None:
        at_least(1, at_once=self.at_once)
        for key, values in self.grid.items():
            if isinstance(values, str):
                raise SboraxError(f"{key}: give its values as a list, got {values!r}")
        if not any(len(values) > 1 for values in self.grid.values()):
            raise SboraxError("nothing to sweep over: give a key several values, such as optimizer.lr=1e-4,3e-4")
        if (count := math.prod(map(len, self.grid.values()))) > MOST:
            raise SboraxError(f"{count:,} members are more than the {MOST} of a sweep; leave out some values")
        for key, values in self.grid.items():
            repeated = [value for number, value in enumerate(values) if value in values[:number]]
            if repeated or not values:
                raise SboraxError(f"{key}: {f'{repeated[0]} is given twice' if repeated else 'has no value'}")

    def members(self) -> tuple[Member, ...]:
        """Every combination, the last key varying fastest.

        Raises SboraxError as `override` does, for equal members, and for a key in which members may not differ.
        """
        members = []
        for values in itertools.product(*self.grid.values()):
            pairs = list(zip(self.grid, map(_text, values), strict=True))
            changes = tuple(f"{key}={text}" for key, text in pairs)
            varied = [f"{_short(key, self.grid)}={_label(text)}" for key, text in pairs if len(self.grid[key]) > 1]
            members.append(Member(",".join(varied).replace("/", "_"), changes, override(self.experiment, changes)))
        _check(members)
        return tuple(members)


def read_grid(words: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Split command-line words into changes of the experiment, `key=value`, and the grid, `key=value,value`.

    Commas in brackets and quotes belong to a value: `optimizer.betas=[0.9,0.99],[0.9,0.999]`.
    Raises SboraxError for a key given twice.
    """
    changes, grid = [], {}
    for word in words:
        key, equals, text = word.partition("=")
        values = tuple(_values(text))
        # A mesh of several axes is one value.
        if not equals or len(values) == 1 or entries(text) is not None:
            changes.append(word)
        elif key in grid:
            raise SboraxError(f"{key}: is given twice; put all its values into one, {key}={text},...")
        else:
            grid[key] = values
    return changes, grid


def differences(left: Any, right: Any, where: str = "") -> Iterator[str]:
    """Dotted keys at which two encoded configs differ."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        items = [(name, left[name], right[name]) for name in left]
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        items = [(str(number), *pair) for number, pair in enumerate(zip(left, right, strict=True))]
    else:
        if left != right:
            yield where
        return
    for name, left_item, right_item in items:
        yield from differences(left_item, right_item, f"{where}.{name}" if where else name)


def varying(members: Sequence[Member]) -> list[str]:
    """Dotted keys at which some member differs from the first."""
    first, *rest = (encode(member.experiment) for member in members)
    return list(dict.fromkeys(key for other in rest for key in differences(first, other)))


def _values(text: str) -> Iterator[str]:
    """The parts of a text between commas that are in no brackets and no quotes."""
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[({":
            depth += 1
        elif letter in "])}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def _text(value: Any) -> str:
    """A value as it is written on the command line; of a dataclass, the fields that differ from their defaults."""
    if isinstance(value, str):
        return value
    content = encode(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        usual = {field.name for field in dataclasses.fields(value) if getattr(value, field.name) == field.default}
        content = {name: item for name, item in content.items() if name not in usual or name == "rank"}
    return json.dumps(content)


def _label(text: str) -> str:
    """A value as part of a directory's name: `{"type": "LoRA", "rank": 2}` is `LoRA(rank=2)`."""
    try:
        value = parse(text.encode(), "") if text.startswith("{") else None
    except SboraxError:
        return text
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return text
    options = ",".join(f"{name}={json.dumps(item)}" for name, item in value.items() if name != "type")
    return f"{value['type']}({options})" if options else value["type"]


def _short(key: str, keys: Mapping[str, Any]) -> str:
    """The last part of a key, or the whole key if another one ends in the same part."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _check(members: Sequence[Member]) -> None:
    """Raise SboraxError unless the members can be trained over one base and compared."""
    first = members[0].experiment
    for number, member in enumerate(members):
        for other in members[:number]:
            if member.experiment == other.experiment:
                raise SboraxError(f"{member.name} and {other.name} are the same run; leave one out")
    for wrong, why in (
        (first.mesh is not None, "mesh: a sweep runs on one device; leave mesh at None"),
        (
            any(not isinstance(member.experiment.optimizer, AbstractOptimizer) for member in members),
            "optimizer: a sweep needs the learning rate of every step, which an optax transformation does not give; "
            "give an Optimizer, or a class of yours that extends AbstractOptimizer",
        ),
        (first.save.best, "save.best: a sweep keeps the last adapter of each member; set save.best=false"),
    ):
        if wrong:
            raise SboraxError(why)
    for key in varying(members):
        if key.partition(".")[0] not in MAY_VARY:
            raise SboraxError(f"{key}: members may differ in {', '.join(MAY_VARY[:-1])}; run each value of {key} alone")
    # A kernel that a method rewrites is read dense, any other in 4 bits.
    dense = {json.dumps(_rewriting(member.experiment)) for member in members}
    if first.quant is not None and len(dense) > 1:
        raise SboraxError(
            f"quant: members rewrite different kernels before these are quantised, so that no base of {first.quant} is "
            "common to them; sweep over each method that rewrites the base alone"
        )


def _rewriting(experiment: Experiment) -> list[Any]:
    """Which kernels an experiment's methods rewrite: patterns and layers of its rules. Empty if they rewrite none."""
    listed = [
        [rule.pattern, encode(rule.layers), rule.method is not None and rule.method.rewrites_base]
        for rule in as_rules(experiment.rules)
    ]
    return listed if rewrites_base(experiment) else []


def rewrites_base(experiment: Experiment) -> bool:
    """Whether a rule's method rewrites the base."""
    methods = (rule.method for rule in as_rules(experiment.rules))
    return any(method is not None and method.rewrites_base for method in methods)
