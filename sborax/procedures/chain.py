"""COLA: Chain of LoRA, arXiv:2401.04151."""

import dataclasses
from typing import Any

from jaxtyping import Array, Key

from sborax.adapters.core import SboraxError
from sborax.procedures.procedure import Boundary, Run
from sborax.procedures.segment import AbstractSegmented, check_segments, fold, fresh


@dataclasses.dataclass(frozen=True)
class COLA(AbstractSegmented):
    """Tune, tie a knot (W <- W + s a b, in float32), extend: new a and b, a new optimiser. One chain over a run.

    - every: steps of a segment; the last may be shorter. The paper's chains have 1 to 3 segments; it does not say where
        the knots were. The learning rate goes on along the schedule of the whole run.
    - requantise: allow a quantised base, whose rounding errors then add up.

    The function does not change at a knot, since b = 0 after it. Adapted kernels are held in float32. The rank of the
    total change is at most that of all segments together. One segment is plain LoRA.
    """

    paper = "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning, arXiv:2401.04151"

    every: int
    requantise: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SboraxError(f"COLA: every must be at least 1 step, got {self.every}")

    def check(self, run: Run, base: dict[str, Any]) -> None:
        check_segments(self, run, base, self.requantise)

    def due(self, step: int, run: Run) -> bool:
        return step % self.every == 0 and step < run.steps

    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        base = fold(boundary.base, boundary.adapters)
        return dataclasses.replace(boundary, adapters=fresh(key, run, base), base=base)
