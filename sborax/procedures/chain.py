"""COLA: Chain of LoRA, arXiv:2401.04151."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import Array, Key

from sborax.adapters.core import SboraxError
from sborax.adapters.tree import Adapters
from sborax.procedures.procedure import AbstractProcedure, Boundary, Run
from sborax.procedures.segment import check_segments, fold, fresh, one_adapter, replay_segments, widened


@dataclasses.dataclass(frozen=True)
class COLA(AbstractProcedure):
    """Tune, tie a knot (W <- W + s a b, in float32), extend: new a and b, a new optimiser. One chain over a run.

    every: steps of a segment; the last may be shorter. The paper's chains have 1 to 3 segments; it does not say where
        the knots were. The learning rate goes on along the schedule of the whole run.
    requantise: allow a quantised base, whose rounding errors then add up.

    The function does not change at a knot, since b = 0 after it. Adapted kernels are held in float32. The rank of the
    whole change is at most that of all segments together. One segment is plain LoRA.
    """

    paper = "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning, arXiv:2401.04151"
    resets = True
    folds = True

    every: int
    requantise: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SboraxError(f"COLA: every must be at least 1 step, got {self.every}")

    def check(self, run: Run, base: dict[str, Any]) -> None:
        check_segments(self, run, base, self.requantise)

    def watch(self, run: Run) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(optax.identity())

    def start(self, key: Key[Array, ""], run: Run, boundary: Boundary) -> Boundary:
        return dataclasses.replace(boundary, base=widened(boundary.base, run))

    def due(self, step: int, run: Run) -> bool:
        return step % self.every == 0 and step < run.steps

    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        base = fold(boundary.base, boundary.adapters)
        return dataclasses.replace(boundary, adapters=fresh(key, run, base), base=base)

    def replay(
        self,
        key_of: Callable[[int], Key[Array, ""]],
        done: int,
        run: Run,
        boundary: Boundary,
        kept: Callable[[int], Adapters],
    ) -> Boundary:
        return replay_segments(self, key_of, done, run, boundary, kept)

    def settle(self, boundary: Boundary) -> Boundary:
        return boundary

    def whole(self, segments: list[Adapters], run: Run) -> Adapters:
        return one_adapter(segments, [1.0] * len(segments), run)
