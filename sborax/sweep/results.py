"""The results of a sweep: `sweep.json`, and a table with the best member marked."""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.config.documents import read_object
from sborax.records.disk import replace
from sborax.sweep.grid import Member
from sborax.sweep.groups import Group

SWEEP = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a member. Losses are in nats per token.

    - program: the number of its group; members of a group share a program.
    - diverged: the step whose loss or gradient was not finite; None if there was none.
    """

    name: str
    changes: tuple[str, ...]
    program: int
    steps: int
    diverged: int | None
    last_loss: float | None
    eval_loss: float | None

    @property
    def loss(self) -> float:
        """The loss to compare members by: on held-out data, else the last training loss; infinite if it diverged."""
        known = self.last_loss if self.eval_loss is None else self.eval_loss
        return math.inf if self.diverged or known is None else known


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of a sweep.

    - finished: False until every member has ended.
    - seconds: of this process.
    """

    finished: bool
    seconds: float
    members: tuple[Result, ...]

    @classmethod
    def of(cls, members: Sequence[Member], groups: Sequence[Group]) -> "Results":
        """The results of members that have not begun."""
        programs = {member.name: group.number for group in groups for member in group.members}
        nothing = 0, None, None, None
        results = (Result(member.name, member.changes, programs[member.name], *nothing) for member in members)
        return cls(False, 0.0, tuple(results))

    def updated(self, changed: Sequence[Result], goals: Mapping[str, int], began: float) -> "Results":
        """The results with those of some members replaced.

        - goals: how many steps each member is to make, by name.
        - began: when the process began, by `time.monotonic`.
        """
        by_name = {result.name: result for result in changed}
        members = tuple(by_name.get(result.name, result) for result in self.members)
        finished = all(result.diverged or result.steps == goals[result.name] for result in members)
        return Results(finished, time.monotonic() - began, members)

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
    results = Results(content["finished"], content["seconds"], members)
    return results if results.best == best else None


def read_members(place: epath.Path) -> list[dict[str, Any]]:
    """The members in `sweep.json`, each with a `name`. Raises SboraxError if there are none."""
    members = read_object(place / SWEEP).get("members")
    if not isinstance(members, list) or not all(
        isinstance(member, dict) and isinstance(member.get("name"), str) for member in members
    ):
        raise SboraxError(f"{place / SWEEP}: holds no members of a sweep; restore it from a copy, or begin a new sweep")
    return members


def check_same(place: epath.Path, members: Sequence[Member]) -> None:
    """Raise SboraxError if `place` holds a sweep over other members."""
    names = [member["name"] for member in read_members(place)]
    if names != [member.name for member in members]:
        raise SboraxError(f"{place}: holds a sweep over {'; '.join(names)}; resume it with the same values")
