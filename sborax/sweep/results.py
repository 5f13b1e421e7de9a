"""The results of a sweep: `sweep.json`, and a table with the best member marked."""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.config.documents import read_object
from sborax.records.disk import replace
from sborax.sweep.grid import Member, arms, tried
from sborax.sweep.groups import Group
from sborax.sweep.rates import LR, SEEDS

SWEEP = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a member. Losses are in nats per token.

    - program: the number of its group; members of a group share a program.
    - stopped: the rung at which halving stopped it; None if it did not.
    - diverged: the step whose loss or gradient was not finite; None if there was none.
    """

    name: str
    changes: tuple[str, ...]
    program: int
    steps: int
    diverged: int | None
    last_loss: float | None
    eval_loss: float | None
    stopped: int | None = None

    def over(self, steps: int) -> bool:
        """Whether it has made its steps, or will make no more."""
        return bool(self.diverged or self.stopped) or self.steps == steps

    @property
    def loss(self) -> float:
        """The loss to compare members by: on held-out data, else the last training loss.

        It is infinite for a member that diverged, was stopped or has no finite loss.
        """
        last = self.last_loss if self.eval_loss is None else self.eval_loss
        # The last update may have made a model whose held-out loss is no number, which compares with nothing.
        if self.diverged or self.stopped or last is None or not math.isfinite(last):
            return math.inf
        return last


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of a sweep.

    - finished: False until every member has ended.
    - seconds: of this process.
    - halving: the rungs, ascending; empty without any.
    """

    finished: bool
    seconds: float
    members: tuple[Result, ...]
    halving: tuple[int, ...] = ()

    @classmethod
    def of(cls, members: Sequence[Member], groups: Sequence[Group], halving: tuple[int, ...] = ()) -> "Results":
        """The results of members that have not begun."""
        programs = {member.name: group.number for group in groups for member in group.members}
        nothing = 0, None, None, None
        results = (Result(member.name, member.changes, programs[member.name], *nothing) for member in members)
        return cls(False, 0.0, tuple(results), halving)

    def of_member(self, member: Member) -> Result:
        """The result of a member."""
        return next(result for result in self.members if result.name == member.name)

    def running(self, members: Sequence[Member]) -> list[int]:
        """The numbers of those members that halving has not stopped."""
        return [number for number, member in enumerate(members) if not self.of_member(member).stopped]

    def including(self, other: "Results") -> "Results":
        """The results with members of `other` that are not among them."""
        names = {result.name for result in self.members}
        added = tuple(result for result in other.members if result.name not in names)
        return dataclasses.replace(self, members=(*self.members, *added))

    def updated(self, changed: Sequence[Result]) -> "Results":
        """The results with those of some members replaced."""
        by_name = {result.name: result for result in changed}
        members = tuple(by_name.get(result.name, result) for result in self.members)
        return dataclasses.replace(self, finished=False, members=members)

    def halved(self, rung: int) -> "Results":
        """The results once the members with the higher losses at a rung are stopped.

        After the n-th rung, at most count / 2^n members are left, rounded up. Of members with equal losses, the earlier
        ones are kept. Members that diverged have stopped before.
        """
        count = math.ceil(len(self.members) / 2 ** (self.halving.index(rung) + 1))
        running = [number for number, result in enumerate(self.members) if not (result.diverged or result.stopped)]
        worse = sorted(running, key=lambda number: self.members[number].loss)[count:]
        members = (
            dataclasses.replace(result, stopped=rung) if number in worse else result
            for number, result in enumerate(self.members)
        )
        return dataclasses.replace(self, members=tuple(members))

    @property
    def best(self) -> str | None:
        """The name of the member with the lowest loss; None before the first step."""
        first = min(self.members, key=lambda result: result.loss)
        return first.name if math.isfinite(first.loss) else None

    def table(self) -> list[str]:
        """A line for each member, with the number of the program that it shares, and a mark at the best."""
        width = max(len("member"), *(len(result.name) for result in self.members))
        sizes = collections.Counter(result.program for result in self.members)
        lines = [f"{'member':{width}}  {'program':>7}  {'last loss':>9}  {'held-out':>9}"]
        for result in self.members:
            program = str(result.program) if sizes[result.program] > 1 else "alone"
            cells = ("" if loss is None else f"{loss:.4f}" for loss in (result.last_loss, result.eval_loss))
            mark = f"  diverged at step {result.diverged:,}" if result.diverged else ""
            mark = f"  stopped at step {result.stopped:,}" if result.stopped else mark
            mark = "  best" if result.name == self.best else mark
            lines.append(f"{result.name:{width}}  {program:>7}  " + "  ".join(f"{cell:>9}" for cell in cells) + mark)
        return lines


def write_results(place: epath.Path, members: Sequence[Member], results: Results | None = None) -> None:
    """Write `sweep.json`: the members, and the results once there are any."""
    if results is None:
        content: dict[str, Any] = {"members": [{"name": member.name, "changes": member.changes} for member in members]}
    else:
        content = {"best": results.best, **dataclasses.asdict(results)}
    replace(place / SWEEP, json.dumps(content, indent=2) + "\n")


def read_results(place: epath.Path) -> Results | None:
    """Read the results in `sweep.json`; None if it has none yet, or other fields.

    Raises SboraxError for a file that is no JSON object.
    """
    content = read_object(place / SWEEP)
    best = content.pop("best", None)
    names, member_names = ({field.name for field in dataclasses.fields(kind)} for kind in (Results, Result))
    if content.keys() != names or any(member.keys() != member_names for member in content["members"]):
        return None
    members = tuple(Result(**{**member, "changes": tuple(member["changes"])}) for member in content["members"])
    results = Results(content["finished"], content["seconds"], members, tuple(content["halving"]))
    return results if results.best == best else None


def read_members(place: epath.Path) -> list[dict[str, Any]]:
    """The members in `sweep.json`, each with a `name`. Raises SboraxError if there are none."""
    members = read_object(place / SWEEP).get("members")
    if not isinstance(members, list) or not all(
        isinstance(member, dict) and isinstance(member.get("name"), str) for member in members
    ):
        raise SboraxError(f"{place / SWEEP}: holds no members of a sweep; restore it from a copy, or begin a new sweep")
    return members


def check_same(place: epath.Path, members: Sequence[Member], auto: bool) -> None:
    """Raise SboraxError if `place` holds a sweep over other members.

    - auto: whether the sweep may have added members.
    """
    names = [member["name"] for member in read_members(place)]
    if names[: len(members) if auto else None] != [member.name for member in members]:
        raise SboraxError(f"{place}: holds a sweep over {'; '.join(names)}; resume it with the same values")


def rungs(halving: Sequence[int] | Literal["auto"], goals: Mapping[str, int]) -> tuple[int, ...]:
    """The rungs of a sweep: those that are given, or for "auto" at 1/2, 1/4, ... of the run, until one member is left.

    - goals: how many steps each member is to make, by name.

    Raises SboraxError if members make different numbers of steps, and for a rung that is not before the last step.
    """
    if not halving:
        return ()
    steps = min(goals.values())
    if len(set(goals.values())) > 1:
        raise SboraxError("halving: members make unequal numbers of steps, so that they have no rungs in common")
    depth = math.ceil(math.log2(len(goals)))
    halves = sorted({steps // 2**number for number in range(1, depth + 1)} - {0})
    at = tuple(halves) if isinstance(halving, str) else tuple(halving)
    if not at or at[-1] >= steps:
        last = at[-1] if at else 0
        raise SboraxError(f"halving: there is no rung at step {last:,}, the run ends at {steps:,}; give earlier steps")
    return at


def rate_lines(members: Sequence[Member], results: Results) -> list[str]:
    """What each combination of the other values says of its learning rates."""
    losses = {result.name: result.loss for result in results.members}
    lines = []
    for arm in arms(members):
        rates = tried(arm, losses)
        changes = ", ".join(change for change in arm[0].changes if change.partition("=")[0] not in (LR, *SEEDS))
        if rates.best is None:
            says = "diverged at every learning rate"
        else:
            end = "lowest" if rates.best == rates.rates[0] else "highest"
            where = "interior" if rates.interior else f"the {end} that was tried, so not known to be the best"
            says = f"best learning rate {rates.best:g}, {where}"
        lines.append(f"{changes}: {says}" if changes else says)
    return lines
