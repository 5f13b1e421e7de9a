"""Writes the numbers of a run's steps to `metrics.jsonl` and the other logs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sborax.records.eval_losses import SampleLoss, write_eval_losses
from sborax.records.report import Metrics
from sborax.train.figures import Figures
from sborax.train.log import AbstractLog, scalars
from sborax.train.step import DROPPED, ROUTER_LOSSES


@dataclasses.dataclass(frozen=True)
class DispatchedStep:
    """A step that has been dispatched.

    - step: its number, from 1.
    - numbers: as `make_step` returns them; on the host once the step has ended.
    - tokens: inputs, without padding.
    - seconds: since the end of the step before; 0 until the step has ended.
    - compiled: whether a program was compiled for it.
    - epoch: of the data.
    """

    step: int
    numbers: Any
    tokens: int
    seconds: float
    compiled: bool
    epoch: int


@dataclasses.dataclass(frozen=True)
class Record:
    """Where the numbers of a run are written. figures: computes metrics from the numbers of a step."""

    metrics: Metrics
    figures: Figures
    logs: Sequence[AbstractLog] = ()

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line, which has a `step`. Raises SboraxError if it cannot be written."""
        self.metrics.add(dict(line))
        for log in self.logs:
            log.add(line["step"], dict(scalars(line)))

    def add_eval_losses(self, losses: Sequence[SampleLoss]) -> None:
        """Write the held-out loss of every sample. Raises SboraxError if that fails."""
        if self.metrics.writes:
            write_eval_losses(self.metrics.path.parent, losses)

    def add_step(self, dispatched: DispatchedStep, numbers: Mapping[str, Any], lr: float | None) -> None:
        """Write the numbers of a step. lr: its learning rate; None if it is not known."""
        self.add(
            {
                "step": dispatched.step,
                "epoch": dispatched.epoch,
                "loss": numbers["loss"],
                **{name: value for name, value in numbers.items() if name in (*ROUTER_LOSSES, DROPPED)},
                **({} if lr is None else {"lr": lr}),
                "grad_norm": numbers["grad_norm"],
                "tokens": dispatched.tokens,
                "counted_tokens": int(numbers["tokens"]),
                "seconds": round(dispatched.seconds, 4),
                "compiled": dispatched.compiled,
                **self.figures.of(numbers, dispatched.tokens, dispatched.seconds),
                "grad_norms": numbers["grad_norms"],
            }
        )
