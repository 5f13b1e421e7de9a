"""The members of a sweep, stepped together."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sborax.adapters.core import SboraxError
from sborax.adapters.routing import selective
from sborax.adapters.vectors import VECTORS
from sborax.data.batches import Batch
from sborax.layout.state import Flat, Parts, TrainState
from sborax.records.eval_losses import SampleLoss, sample_losses
from sborax.records.report import Progress, Speed
from sborax.sweep.grid import Member
from sborax.sweep.members import (
    StackedMembers,
    SweepState,
    make_sweep_evaluation,
    make_sweep_step,
    member_of,
    with_member,
)
from sborax.train.prepare import Prepared
from sborax.train.record import DispatchedStep, Record
from sborax.train.step import check_alive, not_finite
from sborax.train.stepper import AbstractStepper


class SweepStepper(AbstractStepper):
    """Steps all members of a sweep.

    - prepared: of every member.
    - base: the part of the base that all members share.
    - records: of the members that go on, by number.
    - diverged: the step at which a member was stopped, by the member's number.
    """

    def __init__(
        self,
        members: Sequence[Member],
        prepared: Sequence[Prepared],
        stacked: StackedMembers,
        state: SweepState,
        base: Flat,
        records: Mapping[int, Record],
        progress: Progress,
    ) -> None:
        self.members, self.prepared, self.stacked, self.state, self.base = members, prepared, stacked, state, base
        self.records, self.progress, self.speed = records, progress, Speed()
        self.diverged = {number: int(step) for number, step in enumerate(state.diverged) if step}
        self.rates = np.asarray(stacked.constants.lr)
        model = prepared[0].model
        self._step, self._evaluation = make_sweep_step(model, stacked), make_sweep_evaluation(model, stacked)

    def step(self, number: int, batch: Batch) -> dict[str, Any]:
        stacked = self.stacked
        self.state, numbers = self._step(self.state, stacked.constants, stacked.shared, self.base, batch)
        return numbers

    @property
    def ended(self) -> bool:
        return self.diverged.keys() >= self.records.keys()

    def programs(self) -> int:
        return self._step._cache_size()  # type: ignore[attr-defined]

    def record(self, dispatched: DispatchedStep, first: bool) -> str | None:
        losses = []
        for row, place in enumerate(self.records):
            if place in self.diverged:
                continue
            member = self.members[place]
            numbers = jax.tree.map(lambda leaf, row=row: float(leaf[row]), dispatched.numbers)
            problem = not_finite(numbers)
            if problem is not None:
                self.diverged[place] = dispatched.step
                self.progress.say(f"step {dispatched.step}: {member.name}: {problem}; the others continue")
                continue
            if first:
                self._check_alive(place, numbers["grad_norms"])
            losses.append(numbers["loss"])
            self.records[place].add_step(dispatched, numbers, float(self.rates[place, dispatched.step - 1]))
        if not losses:
            return None
        speed = self.speed.mean() or dispatched.tokens / dispatched.seconds
        self.progress.show(dispatched.step, min(losses), speed * len(losses))
        return None

    def _check_alive(self, number: int, grad_norms: dict[str, float]) -> None:
        sites, procedure = self.prepared[0].plan.sites, self.prepared[number].procedure
        # Adapters and tokens that no sequence of the first batch has selected are not dead.
        idle = {site.path for site in sites if selective(site.method)} | {*VECTORS}
        if procedure is not None:
            idle |= procedure.resting(self.member(number)[0].train["adapters"])
        try:
            check_alive({path: norm for path, norm in grad_norms.items() if path not in idle})
        except SboraxError as error:
            raise SboraxError(f"{self.members[number].name}: {error}") from None

    def due(self, step: int) -> bool:
        procedure = self.prepared[0].procedure
        return procedure is not None and procedure.due(step)

    def act(self, step: int) -> None:
        """Apply the procedure to every member that goes on, one after the other."""
        for number in self.records:
            prepared = self.prepared[number]
            if number not in self.diverged and prepared.procedure is not None:
                single, parts = self.member(number)
                self._replace(number, *prepared.procedure.apply(step, single, parts, self.stacked.tx(number)))

    def replay(self) -> None:
        """Make every member's constant parts again as the procedure had made them, after a checkpoint is restored."""
        for number in self.records:
            prepared = self.prepared[number]
            if prepared.procedure is not None:
                single, parts = self.member(number)
                self._replace(number, single, prepared.procedure.replay(int(single.step), single, parts))

    def member(self, number: int) -> tuple[TrainState, Parts]:
        """The state and the constant parts of a member, as a single run has them."""
        return member_of(self.stacked, self.state, self.base, number)

    def _replace(self, number: int, single: TrainState, parts: Parts) -> None:
        self.stacked, self.state = with_member(self.stacked, self.state, number, single, parts)

    def evaluate(self, step: int, held_out: Sequence[Batch]) -> None:
        stacked, train = self.stacked, self.state.run.train
        totals, items = np.zeros(len(self.records)), np.zeros(len(self.records))
        losses: dict[int, list[SampleLoss]] = {place: [] for place in self.records}
        for batch in held_out:
            sums, counted, terms = self._evaluation(train, stacked.constants, stacked.shared, self.base, batch)
            totals, items = totals + np.asarray(sums, np.float64), items + np.asarray(counted, np.float64)
            if terms is not None and step == self.prepared[0].steps:
                for place, of_member in zip(self.records, np.asarray(terms), strict=True):
                    losses[place] += sample_losses(batch, of_member)
        values = dict(zip(self.records, map(float, totals / np.maximum(items, 1)), strict=True))
        for place, value in values.items():
            if place not in self.diverged:
                self.records[place].add({"step": step, "eval_loss": value})
                if losses[place]:
                    self.records[place].add_eval_losses(losses[place])
        finite = {place: value if np.isfinite(value) else np.inf for place, value in values.items()}
        best = min((value, place) for place, value in finite.items() if place not in self.diverged)
        self.progress.say(f"step {step:,}: lowest held-out loss {best[0]:.4f}, of {self.members[best[1]].name}")
