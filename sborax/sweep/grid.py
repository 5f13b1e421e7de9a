"""A sweep: an experiment, and a grid of values for some of its fields. Every combination is a member."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal

from sborax.adapters.core import SboraxError
from sborax.adapters.paths import as_rules
from sborax.config.codec import encode, entries, override
from sborax.config.documents import parse
from sborax.data.options import at_least
from sborax.sweep.rates import EXTENSIONS, LR, SEEDS, Sensitivity, extension, higher, lower, sensitivity
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
    "train_tokens",
    "imports",
)
"""Fields of an experiment in which members may differ. The others say what the base is, or how members are compared."""

MOST = 512
"""The most members that a sweep may have."""
LONGEST = 200
"""The most bytes of a member's name; file systems allow 255."""
AUTO = "auto"
"""In place of learning rates, or after them: more are tried until the best is neither the lowest nor the highest."""


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
    """Several runs over one base and one data set. Those that differ only in arrays share a program, see `groups`.

    Args:
    - experiment: the experiment that the grid changes.
    - grid: values by dotted key, `{"optimizer.lr": (1e-4, 3e-4), "seed_adapter": (0, 1)}`; every combination is a
      member. A text is read as on the command line.
    - at_once: the number of members of a program that a step computes together, by `vmap`; such groups follow one
      another, by `lax.map`. Larger groups need more memory. None (default): one on a CPU, all elsewhere.
    - halving: rungs of successive halving (arXiv:1502.07943): at each of these steps the half of the members with the
      higher held-out loss stops. "auto" for as many rungs as leave one member, each at twice the step of the one
      before and the last in the middle of the run. Empty (default) for none.

    The learning rates of the grid may be `("auto",)`, or end in "auto" (see `rates.extension`). Each combination of the
    other values then gets further rates until its best one, by the mean loss over its seeds, is interior.

    Raises SboraxError for a grid without alternatives, with a value given twice, or with more than 512 members, and for
    rungs and "auto" that do not go together with the rest.
    """

    experiment: Experiment
    grid: Mapping[str, Sequence[Any]]
    at_once: int | None = None
    halving: Sequence[int] | Literal["auto"] = ()

    def __post_init__(self) -> None:
        at_least(1, at_once=self.at_once)
        rungs = [] if self.halving == AUTO else list(self.halving)
        if any(type(rung) is not int or rung < 1 for rung in rungs) or rungs != sorted(set(rungs)):
            raise SboraxError(
                f"halving: {', '.join(map(str, rungs))}: rungs are steps in ascending order, such as 100, 200"
            )
        if self.halving and self.experiment.eval.data is None:
            raise SboraxError("halving: needs held-out losses to compare members by; set eval.data")
        if self.auto:
            self._check_auto()
        for key, values in self.grid.items():
            if isinstance(values, str):
                raise SboraxError(f"{key}: give its values as a list, got {values!r}")
        if not self.auto and not any(len(values) > 1 for values in self.grid.values()):
            raise SboraxError("nothing to sweep over: give a key several values, such as optimizer.lr=1e-4,3e-4")
        if (count := math.prod(map(len, self.values.values()))) > MOST:
            raise SboraxError(f"{count:,} members are more than the {MOST} of a sweep; leave out some values")
        for key, values in self.grid.items():
            repeated = [value for number, value in enumerate(values) if value in values[:number]]
            if repeated or not values:
                raise SboraxError(f"{key}: {f'{repeated[0]} is given twice' if repeated else 'has no value'}")

    @property
    def auto(self) -> bool:
        """Whether learning rates are added until the best is interior."""
        return AUTO in self.grid.get(LR, ())

    @property
    def values(self) -> dict[str, tuple[Any, ...]]:
        """The grid, with the learning rates to begin with in place of "auto"."""
        values = {key: tuple(items) for key, items in self.grid.items()}
        if self.auto:
            rates = tuple(item for item in values[LR] if item != AUTO)
            rate = getattr(self.experiment.optimizer, "lr", 0.0)
            values[LR] = rates or tuple(f"{lr:g}" for lr in (lower(rate), rate, higher(rate)))
        return values

    def members(self) -> tuple[Member, ...]:
        """Every combination, the last key varying fastest.

        Raises SboraxError as `override` does, for equal members, and for a key in which members may not differ.
        """
        members = [self._member(dict(zip(self.grid, values, strict=True))) for values in product(*self.values.values())]
        _check(members)
        return tuple(members)

    def extended(self, members: Sequence[Member], losses: Mapping[str, float]) -> tuple[Member, ...]:
        """The members to add: for each combination of values whose best learning rate is at an end, the next rate.

        - members: all so far.
        - losses: by name; infinite for a member that diverged.
        """
        added = []
        for arm in arms(members):
            rates = tried(arm, losses)
            rate = extension(rates)
            if rate is None or len(rates.rates) >= len(self.values[LR]) + EXTENSIONS:
                continue
            first = min(member_rate(member) for member in arm)
            for member in arm:
                if member_rate(member) == first:
                    values: dict[str, Any] = {}
                    for change in member.changes:
                        key, _, values[key] = change.partition("=")
                    added.append(self._member({**values, LR: f"{rate:g}"}))
        return tuple(added)

    def _member(self, values: Mapping[str, Any]) -> Member:
        texts = {key: _text(value) for key, value in values.items()}
        changes = tuple(f"{key}={text}" for key, text in texts.items())
        several = [key for key, items in self.values.items() if len(items) > 1]
        name = ",".join(f"{_short(key, self.grid)}={_label(texts[key])}" for key in several)
        return Member(_directory(name), changes, override(self.experiment, changes))

    def _check_auto(self) -> None:
        rates = [item for item in self.grid[LR] if item != AUTO]
        rate = getattr(self.experiment.optimizer, "lr", None)
        if self.halving:
            raise SboraxError(f"{LR}=auto: tries rates one after the other, and halving compares members; use one")
        if len(rates) == 1:
            raise SboraxError(
                f"{LR}={rates[0]},auto: one rate shows no direction to extend; give two or more, or only auto, which "
                "begins with the experiment's rate and the one on either side of it"
            )
        if not rates and not (isinstance(rate, float) and rate > 0):
            raise SboraxError(f"{LR}=auto: the experiment has no learning rate to begin with; give two, and then auto")


def member_rate(member: Member) -> float:
    """The peak learning rate of a member; 0 for an optimiser without a field `lr`."""
    return float(getattr(member.experiment.optimizer, "lr", 0.0))


def arms(members: Sequence[Member]) -> list[tuple[Member, ...]]:
    """Members that differ in learning rate and seeds alone, together."""
    by_changes: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        changes = tuple(change for change in member.changes if change.partition("=")[0] not in (LR, *SEEDS))
        by_changes.setdefault(changes, []).append(member)
    return [tuple(arm) for arm in by_changes.values()]


def tried(arm: Sequence[Member], losses: Mapping[str, float]) -> Sensitivity:
    """The mean loss over seeds by learning rate. A rate at which a seed diverged is infinitely bad."""
    by_rate: dict[float, list[float]] = {}
    for member in arm:
        by_rate.setdefault(member_rate(member), []).append(losses[member.name])
    return sensitivity({rate: sum(losses) / len(losses) for rate, losses in by_rate.items()}, lower=True)


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
        if not equals or (len(values) == 1 and (key, text) != (LR, AUTO)) or entries(text) is not None:
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
    first, *later = (encode(member.experiment) for member in members)
    return list(dict.fromkeys(key for other in later for key in differences(first, other)))


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


def _directory(name: str) -> str:
    """The name of a member as that of its directory. A long one is cut and ends in a digest of all of it."""
    plain = name.replace("/", "_")
    if len(plain.encode()) <= LONGEST:
        return plain
    end = f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return plain.encode()[: LONGEST - len(end)].decode(errors="ignore") + end


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
            f"quant: members rewrite different kernels before these are quantised, so they cannot share a base in "
            f"{first.quant}; run a separate sweep for each method that rewrites the base"
        )


def _rewriting(experiment: Experiment) -> list[Any]:
    """Which kernels an experiment's methods rewrite: patterns and layers of its rules. Empty if they rewrite none."""
    rules = [
        [rule.pattern, encode(rule.layers), rule.method is not None and rule.method.rewrites_base]
        for rule in as_rules(experiment.rules)
    ]
    return rules if rewrites_base(experiment) else []


def rewrites_base(experiment: Experiment) -> bool:
    """Whether a rule's method rewrites the base."""
    methods = (rule.method for rule in as_rules(experiment.rules))
    return any(method is not None and method.rewrites_base for method in methods)
