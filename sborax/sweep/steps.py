"""The steps of a sweep, one after the other: every member's numbers read, checkpoints made, signals obeyed."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from sborax.adapters.core import SboraxError
from sborax.data.batches import Batch, Batches
from sborax.data.stream import stream
from sborax.layout.state import Flat
from sborax.models.language_model import LanguageModel
from sborax.records.checkpoint import Checkpoints
from sborax.records.report import Metrics, Progress, Speed
from sborax.sweep.grid import Member
from sborax.sweep.members import Crew, SweepState, make_sweep_loss, make_sweep_step, member_of, with_member
from sborax.train.figures import Figures
from sborax.train.log import AbstractLog, scalars
from sborax.train.step import check_alive, not_finite
from sborax.train.steps import Taken, due, metrics_line
from sborax.train.stop import Stop
from sborax.train.turns import Turns


@dataclasses.dataclass(frozen=True)
class Begun:
    """What all members share: the model without its parameters, and these; fingerprint, size, trained parameters.

    base: without the kernels that a procedure changes member by member. turns: a procedure at work in each member.
    idle: paths of adapters that may get no gradient in a step.
    """

    model: LanguageModel
    base: Flat
    prints: dict[str, str]
    total: int
    count: int
    idle: set[str]
    turns: tuple[Turns, ...] = ()


@dataclasses.dataclass
class SweepLoop:
    """Steps of all members until the end, a signal, or until every one of them has diverged."""

    members: Sequence[Member]
    begun: Begun
    crew: Crew
    batches: Batches
    held_out: list[Batch]
    checkpoints: Checkpoints
    metrics: Sequence[Metrics]
    steps: int
    done: int
    progress: Progress
    diverged: dict[int, int]
    """Step by number of the member."""
    rates: np.ndarray
    """Learning rates, (members, steps)."""
    figures: Figures
    stop: Stop
    logs: Sequence[Sequence[AbstractLog]] = ()
    speed: Speed = dataclasses.field(default_factory=Speed)
    mark: float = 0.0

    def run(self, state: SweepState) -> SweepState:
        """The state at the end or after a signal.

        Raises SboraxError for a dead adapter, and once no member is left.
        """
        settings = self.members[0].experiment
        step, loss = make_sweep_step(self.begun.model, self.crew), make_sweep_loss(self.begun.model, self.crew)
        pending = None
        self.progress.say("compiling")
        self.mark = time.monotonic()
        read = stream(self.batches.__getitem__, self.done, self.steps)
        with self.stop.in_good_order() as asked, read as batches:
            for number, batch in enumerate(batches, start=self.done):
                programs = step._cache_size()
                state, numbers = step(state, self.crew.own, self.crew.shared, self.begun.base, batch)
                # Looking at a step only after the next is dispatched keeps the device busy.
                if pending is not None:
                    self.look(pending)
                now = number + 1
                pending = Taken(now, numbers, self.batches.tokens(number), step._cache_size() > programs)
                last = now == self.steps or asked.is_set()
                measure = bool(self.held_out) and (last or due(settings.eval.every, now))
                save = last or due(settings.save.every, now)
                turn = bool(self.begun.turns) and self.begun.turns[0].due(now)
                if save or measure or turn or number == self.done:
                    self.look(pending)
                    pending = None
                if turn:
                    state = self.take(now, state)
                if measure:
                    self.measure(state.run.train, loss, now)
                if save:
                    epoch, row = self.batches.position(now)
                    self.checkpoints.save(now, state, {"epoch": epoch, "row": row})
                self.mark = time.monotonic() if save or measure or turn else self.mark
                if last:
                    break
        return state

    def take(self, now: int, state: SweepState) -> SweepState:
        """The state after what the procedure does to every member that goes on, one after the other."""
        for number, turns in enumerate(self.begun.turns):
            if number not in self.diverged:
                single, parts = member_of(self.crew, state, self.begun.base, number)
                single, parts = turns.take(now, single, parts, self.crew.tx(number))
                self.crew, state = with_member(self.crew, state, number, single, parts)
        return state

    def look(self, taken: Taken) -> None:
        """Wait for a step, check every member's numbers and write them down.

        Raises SboraxError once no member is left, and in the first step for a dead adapter.
        """
        numbers = jax.device_get(taken.numbers)
        now = time.monotonic()
        seconds, self.mark = now - self.mark, now
        tokens = taken.tokens
        if not taken.compiled:
            self.speed.add(tokens, seconds)
        epoch, _ = self.batches.position(taken.step)
        losses = []
        for place, member in enumerate(self.members):
            own = jax.tree.map(lambda leaf, place=place: float(leaf[place]), numbers)
            if place in self.diverged:
                continue
            problem = not_finite(own)
            if problem is not None:
                self.diverged[place] = taken.step
                self.progress.say(f"step {taken.step}: {member.name}: {problem}; the others go on")
                continue
            if taken.step == self.done + 1:
                self.check_first(member, own["grad_norms"])
            losses.append(own["loss"])
            lr = float(self.rates[place, taken.step - 1])
            self.tell(place, metrics_line(taken, epoch, own, lr, tokens, seconds, self.figures))
        if not losses:
            raise SboraxError(
                f"step {taken.step}: no member is left, all {len(self.members)} have a loss that is not finite; "
                "lower optimizer.lr or look at the data"
            )
        self.progress.show(taken.step, min(losses), (self.speed.mean() or tokens / seconds) * len(losses))

    def check_first(self, member: Member, grad_norms: dict[str, float]) -> None:
        """Raise SboraxError for an adapter of `member` that got no gradient in its first step."""
        try:
            check_alive({path: norm for path, norm in grad_norms.items() if path not in self.begun.idle})
        except SboraxError as error:
            raise SboraxError(f"{member.name}: {error}") from None

    def tell(self, place: int, line: dict[str, Any]) -> None:
        """Write numbers of one member down wherever they go."""
        self.metrics[place].add(line)
        for log in self.logs[place]:
            log.add(line["step"], dict(scalars(line)))

    def measure(self, train: PyTree, loss: Any, now: int) -> None:
        """The loss per token of every member on held-out data."""
        totals, tokens = np.zeros(self.crew.count), np.zeros(self.crew.count)
        for batch in self.held_out:
            part, counted = loss(train, self.crew.own, self.crew.shared, self.begun.base, batch)
            totals, tokens = totals + np.asarray(part, np.float64), tokens + np.asarray(counted, np.float64)
        values = totals / np.maximum(tokens, 1)
        for place, value in enumerate(values):
            if place not in self.diverged:
                self.tell(place, {"step": now, "eval_loss": float(value)})
        best = min((float(value), place) for place, value in enumerate(values) if place not in self.diverged)
        self.progress.say(f"step {now:,}: lowest held-out loss {best[0]:.4f}, of {self.members[best[1]].name}")
