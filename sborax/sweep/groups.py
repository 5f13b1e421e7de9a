"""Members of a sweep in groups: those of a group differ in arrays alone, and share a program."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from sborax.adapters.core import AbstractMethod, structure
from sborax.adapters.paths import as_rules
from sborax.config.codec import encode
from sborax.sweep.grid import Member, rewrites_base
from sborax.train.experiment import Experiment
from sborax.train.optimizer import AbstractOptimizer, halves


@dataclasses.dataclass(frozen=True)
class Group:
    """Members that share a program.

    - number: of the group, from 1.
    """

    number: int
    members: tuple[Member, ...]

    def place(self, sweep: epath.Path) -> epath.Path:
        """The directory of its checkpoints: that of the sweep for the first group."""
        return sweep if self.number == 1 else sweep / f"program-{self.number}"

    def runs(self, sweep: epath.Path) -> list[epath.Path]:
        """The run directories of its members."""
        return [sweep / member.name for member in self.members]


def grouped(members: Sequence[Member], before: int = 0) -> tuple[Group, ...]:
    """The members in groups, in the order of their first members.

    - before: how many groups the sweep has already.
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(_program(member.experiment), []).append(member)
    return tuple(Group(number, tuple(group)) for number, group in enumerate(groups.values(), start=before + 1))


def _program(experiment: Experiment) -> str:
    """All that the program of a member depends on, as text. Members for which it is equal can share one.

    A base that is rewritten is rewritten once for a group, so nothing on which that depends may differ.
    """
    content = encode(experiment)
    # Learning rates are arrays; modules define classes and change nothing by themselves.
    for name in ("optimizer", "imports"):
        del content[name]
    if not rewrites_base(experiment):
        del content["seed_adapter"]
        rules = as_rules(experiment.rules)
        for rule, of_rule in zip(rules, content["rules"], strict=True):
            of_rule["method"] = None if rule.method is None else [encode(structure(rule.method)), _zeros(rule.method)]
    optimizer = experiment.optimizer
    # `Sweep.members` has checked its type.
    assert isinstance(optimizer, AbstractOptimizer)
    return json.dumps([content, halves(optimizer).__name__, _optimizer_form(optimizer.without_rate())])


def _zeros(method: AbstractMethod) -> list[Any]:
    """Which hyper-parameters of a method, and of the methods it is made of, are zero: those may have no leaf."""
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(method)  # type: ignore[arg-type]
    values = [(field.metadata.get("hyper"), getattr(method, field.name)) for field in fields]
    parts = [part for _, value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [
        *(value == 0 for is_hyper, value in values if is_hyper),
        *(_zeros(part) for part in parts if isinstance(part, AbstractMethod)),
    ]


def _optimizer_form(plain: AbstractOptimizer) -> list[Any]:
    """An optimiser's class and choices, and which of its numbers are zero: the state may have no leaves for those.

    - plain: without its learning rates.
    """

    def form(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: form(part) for name, part in value.items()}
        if isinstance(value, list):
            return [form(part) for part in value]
        return f"number, {value == 0}" if isinstance(value, float) else value

    return [type(plain).__name__, form(encode(plain))]
