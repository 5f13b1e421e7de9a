"""The steps of a run, one after the other: numbers read, checkpoints made, signals obeyed."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from sborax.adapters.core import SboraxError
from sborax.adapters.routing import selective
from sborax.adapters.tree import nodes
from sborax.data.batches import Batch, Batches
from sborax.data.stream import stream
from sborax.layout.hosts import asked_to_stop
from sborax.layout.sharding import Layout
from sborax.layout.state import Parts, TrainState
from sborax.models.language_model import LanguageModel
from sborax.records.best import BEST, Best
from sborax.records.checkpoint import Checkpoints
from sborax.records.report import Metrics, Progress, Speed
from sborax.records.trace import Trace
from sborax.train.experiment import Experiment
from sborax.train.figures import Figures
from sborax.train.log import AbstractLog, scalars
from sborax.train.optimizer import schedule
from sborax.train.step import check_alive, make_loss, make_step, not_finite
from sborax.train.stop import Stop
from sborax.train.turns import Turns


@dataclasses.dataclass(frozen=True)
class Taken:
    """One step that was dispatched and not yet looked at."""

    step: int
    numbers: dict[str, Any]
    tokens: int
    compiled: bool


@dataclasses.dataclass
class Loop:
    """Steps until the end, a signal or a loss that is not finite."""

    experiment: Experiment
    model: LanguageModel
    parts: Parts
    batches: Batches
    held_out: list[Batch]
    checkpoints: Checkpoints
    metrics: Metrics
    steps: int
    done: int
    """Steps made before this process."""
    progress: Progress
    speed: Speed = dataclasses.field(default_factory=Speed)
    saved: int | None = None
    """The step of the newest checkpoint."""
    mark: float = 0.0
    """When the last step was looked at."""
    turns: Turns | None = None
    layout: Layout = Layout()
    shardings: TrainState | None = None
    """Where the state lies on a mesh."""
    stop: Stop = dataclasses.field(default_factory=Stop)
    figures: Figures | None = None
    logs: Sequence[AbstractLog] = ()
    trace: Trace | None = None
    best: Best | None = None
    write: Callable[..., None] | None = None
    """Writes the adapters of a state into a directory: `write(state, parts, directory, **notes)`."""

    def run(self, state: TrainState, tx: optax.GradientTransformation) -> TrainState:
        """The state at the end or after a signal."""
        settings = self.experiment
        # Dropout and initial adapters draw from different streams of one seed.
        key = jax.random.fold_in(jax.random.key(settings.seed_adapter), 1)
        observe = self.turns is not None and self.turns.procedure.observes
        step = make_step(self.model, tx, key, observe, self.shardings)
        lr = schedule(settings.optimizer, self.steps)
        loss = make_loss(self.model)
        pending = None
        self.saved = self.done or None
        self.progress.say("compiling")
        self.mark = time.monotonic()
        own = self.layout.rows(settings.batch_size)
        read = stream(lambda number: self.batches.part(number, own), self.done, self.steps)
        with self.stop.in_good_order() as asked, read as batches:
            for number, batch in enumerate(batches, start=self.done):
                programs = step._cache_size()
                if self.trace is not None:
                    self.trace.before(number, state)
                state, numbers = step(state, self.parts.frozen, self.parts.base, self.layout.batch(batch))
                # Looking at a step only after the next is dispatched keeps the device busy.
                if pending is not None:
                    self.look(pending, lr)
                now = number + 1
                pending = Taken(now, numbers, self.batches.tokens(number), step._cache_size() > programs)
                last = asked_to_stop(asked.is_set(), now) or now == self.steps
                measure = bool(self.held_out) and (last or due(settings.eval.every, now))
                save = last or due(settings.save.every, now)
                turn = self.turns is not None and self.turns.due(now)
                if save or measure or turn or number == self.done:
                    # A checkpoint is only made of a state whose loss is known to be finite.
                    self.look(pending, lr)
                    pending = None
                if self.turns is not None and turn:
                    state, self.parts = self.turns.take(now, state, self.parts, tx)
                if measure:
                    self.keep(now, self.measure(state.train, loss, now), state)
                if save:
                    epoch, row = self.batches.position(now)
                    self.checkpoints.save(now, state, {"epoch": epoch, "row": row})
                    self.saved = now
                self.mark = time.monotonic() if save or measure or turn else self.mark
                if last:
                    break
        return state

    def look(self, taken: Taken, lr: Callable[[int], Any] | None) -> None:
        """Wait for a step, check its numbers and write them down.

        Raises SboraxError for a loss, gradient or update that is not finite, and in the first step for a dead adapter.
        """
        numbers = jax.tree.map(float, jax.device_get(taken.numbers))
        problem = not_finite(numbers)
        if problem is not None:
            kept = f"checkpoint {self.saved} is kept" if self.saved else "there is no checkpoint yet"
            raise SboraxError(f"step {taken.step}: {problem}; {kept}; lower optimizer.lr or look at the data")
        if taken.step == self.done + 1:
            # An expert that no sequence of the first batch chose is not dead.
            idle = {path for path, node in nodes(self.parts.adapters).items() if selective(node.method)}
            check_alive({path: norm for path, norm in numbers["grad_norms"].items() if path not in idle})
        now = time.monotonic()
        seconds, self.mark = now - self.mark, now
        tokens = taken.tokens
        rate = tokens / seconds
        if not taken.compiled:
            self.speed.add(tokens, seconds)
        epoch, _ = self.batches.position(taken.step)
        now_lr = None if lr is None else float(lr(taken.step - 1))
        self.tell(metrics_line(taken, epoch, numbers, now_lr, tokens, seconds, self.figures))
        self.progress.show(taken.step, numbers["loss"], self.speed.mean() or rate)

    def measure(self, train: PyTree, loss: Callable[..., Any], now: int) -> float:
        """The loss per token on held-out data."""
        total = tokens = 0.0
        for batch in self.held_out:
            part, counted = loss(train, self.parts.frozen, self.parts.base, self.layout.batch(batch, axis=0))
            total, tokens = total + float(part), tokens + float(counted)
        value = total / np.maximum(tokens, 1)
        self.tell({"step": now, "eval_loss": float(value)})
        self.progress.say(f"step {now:,}: held-out loss {value:.4f}")
        return float(value)

    def tell(self, line: dict[str, Any]) -> None:
        """Write numbers of a step down wherever they go.

        Raises SboraxError if one of these places refuses.
        """
        self.metrics.add(line)
        for log in self.logs:
            log.add(line["step"], dict(scalars(line)))

    def keep(self, now: int, loss: float, state: TrainState) -> None:
        """Keep the adapter if its held-out loss is the lowest so far."""
        if self.best is None or self.write is None:
            return
        if self.best.offer(now, loss, functools.partial(self.write, state, self.parts)):
            self.progress.say(f"step {now:,}: the lowest held-out loss so far, kept in {BEST}/")


def metrics_line(
    taken: Taken,
    epoch: int,
    numbers: dict[str, Any],
    lr: float | None,
    tokens: int,
    seconds: float,
    figures: Figures | None,
) -> dict[str, Any]:
    """What `metrics.jsonl` says of one step."""
    return {
        "step": taken.step,
        "epoch": epoch,
        "loss": numbers["loss"],
        **{name: value for name, value in numbers.items() if name == "balance_loss"},
        **({} if lr is None else {"lr": lr}),
        "grad_norm": numbers["grad_norm"],
        "tokens": tokens,
        "counted_tokens": int(numbers["tokens"]),
        "seconds": round(seconds, 4),
        "compiled": taken.compiled,
        **({} if figures is None else figures.of(numbers, tokens, seconds)),
        "grad_norms": numbers["grad_norms"],
    }


def due(every: int | None, step: int) -> bool:
    """Whether something done every so many steps is done after this one."""
    return every is not None and step % every == 0
