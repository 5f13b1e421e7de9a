"""Steppers: what the loop drives. `RunStepper` is a single run; a sweep has its own."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from sborax.adapters.routing import selective
from sborax.adapters.tree import nodes
from sborax.adapters.vectors import VECTORS
from sborax.data.batches import Batch
from sborax.layout.hosts import gathered
from sborax.layout.sharding import Layout
from sborax.layout.state import Parts, TrainState
from sborax.records.best import BEST, Best
from sborax.records.eval_losses import SampleLoss, sample_losses, write_eval_losses
from sborax.records.report import Progress, Speed
from sborax.records.trace import Trace
from sborax.train.optimizer import schedule
from sborax.train.prepare import Prepared
from sborax.train.record import DispatchedStep, Record
from sborax.train.step import check_alive, not_finite


class AbstractStepper(abc.ABC):
    """Makes steps, and holds the state between them."""

    state: Any
    """The tree that a checkpoint saves."""
    speed: Speed
    """Tokens per second so far."""

    @abc.abstractmethod
    def step(self, number: int, batch: Batch) -> dict[str, Any]:
        """Dispatch step `number`, counted from 0, and return its numbers, which may still be computed."""

    @property
    @abc.abstractmethod
    def ended(self) -> bool:
        """Whether the run ends early, since nothing is left to train."""

    @abc.abstractmethod
    def programs(self) -> int:
        """The number of programs compiled for steps so far."""

    @abc.abstractmethod
    def record(self, dispatched: DispatchedStep, first: bool) -> str | None:
        """Check and write the numbers of a step that has ended.

        Returns an error message if the run cannot go on, else None.

        Args:
        - first: whether it is the first step of this process.

        Raises SboraxError in the first step for an adapter without a gradient.
        """

    @abc.abstractmethod
    def due(self, step: int) -> bool:
        """Whether the procedure acts after `step` steps."""

    @abc.abstractmethod
    def act(self, step: int) -> None:
        """Let the procedure act after `step` steps."""

    @abc.abstractmethod
    def evaluate(self, step: int, held_out: Sequence[Batch]) -> None:
        """Measure the loss on held-out data after `step` steps, and write it."""


class RunStepper(AbstractStepper):
    """A single run.

    - parts: the arrays that a step reads beside the state, and nothing trained. They change when the procedure acts.
    - best: keeps the adapter with the lowest held-out loss; None for not.
    - trace: a profile of some steps; None for none.
    - write: `write(state, parts, directory, **notes)` writes the adapters of a state.
    """

    def __init__(
        self,
        prepared: Prepared,
        state: TrainState,
        parts: Parts,
        record: Record,
        progress: Progress,
        layout: Layout = Layout(),
        shardings: TrainState | None = None,
        best: Best | None = None,
        trace: Trace | None = None,
        write: Callable[..., None] | None = None,
    ) -> None:
        self.prepared, self.state, self.layout = prepared, state, layout
        # Adapters and tokens that no sequence of the first batch has selected have no gradient, and are not dead.
        self._idle = {path for path, node in nodes(parts.adapters).items() if selective(node.method)} | {*VECTORS}
        # The state has its own copies of what is trained; these would take memory to the end of the run.
        self.parts = dataclasses.replace(parts, adapters={}, trained_base={})
        self.records, self.progress, self.best, self.trace, self.write = record, progress, best, trace, write
        self.speed = Speed()
        self.rate: Callable[[int], Any] | None = schedule(prepared.experiment.optimizer, prepared.steps)
        self._step, self._evaluation = prepared.make_step(shardings), prepared.make_evaluation()

    def step(self, number: int, batch: Batch) -> dict[str, Any]:
        if self.trace is not None:
            self.trace.before(number, self.state)
        batch = self.layout.batch(batch)
        self.state, numbers = self._step(self.state, self.parts.frozen, self.parts.base, batch)
        return numbers

    @property
    def ended(self) -> bool:
        return False

    def programs(self) -> int:
        return self._step._cache_size()  # type: ignore[attr-defined]

    def record(self, dispatched: DispatchedStep, first: bool) -> str | None:
        numbers = jax.tree.map(float, dispatched.numbers)
        problem = not_finite(numbers)
        if problem is not None:
            return problem
        if first:
            idle = set(self._idle)
            if self.prepared.procedure is not None:
                idle |= self.prepared.procedure.resting(self.state.train["adapters"])
            check_alive({path: norm for path, norm in numbers["grad_norms"].items() if path not in idle})
        self.records.add_step(dispatched, numbers, None if self.rate is None else float(self.rate(dispatched.step - 1)))
        self.progress.show(
            dispatched.step, numbers["loss"], self.speed.mean() or dispatched.tokens / dispatched.seconds
        )
        return None

    def due(self, step: int) -> bool:
        return self.prepared.procedure is not None and self.prepared.procedure.due(step)

    def act(self, step: int) -> None:
        assert self.prepared.procedure is not None
        self.state, self.parts = self.prepared.procedure.apply(step, self.state, self.parts, self.prepared.tx)

    def evaluate(self, step: int, held_out: Sequence[Batch]) -> None:
        total = items = 0.0
        ends, losses = step == self.prepared.steps, []
        for batch in held_out:
            placed = self.layout.batch(batch, axis=0)
            loss, counted, terms = self._evaluation(self.state.train, self.parts.frozen, self.parts.base, placed)
            total, items = total + float(loss), items + float(counted)
            if terms is not None and (ends or self.best is not None):
                losses += sample_losses(batch, np.asarray(gathered(terms)))
        value = float(total / np.maximum(items, 1))
        self.records.add({"step": step, "eval_loss": value})
        if ends and losses:
            self.records.add_eval_losses(losses)
        self.progress.say(f"step {step:,}: held-out loss {value:.4f}")
        if self.best is None or self.write is None:
            return
        if self.best.offer(step, value, functools.partial(self._write_best, self.best, self.write, losses)):
            self.progress.say(f"step {step:,}: the lowest held-out loss so far, kept in {BEST}/")

    def _write_best(
        self, best: Best, write: Callable[..., None], losses: Sequence[SampleLoss], place: epath.Path, **notes: Any
    ) -> None:
        """Write the adapters, and beside them the losses by which they are the best."""
        write(self.state, self.parts, place, **notes)
        if losses and best.writes:
            write_eval_losses(place, losses)
