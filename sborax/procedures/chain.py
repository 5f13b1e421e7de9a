"""COLA: Chain of LoRA, arXiv:2401.04151."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sborax.adapters.compose import ByLayer
from sborax.adapters.core import AbstractMethod, Adapter, SboraxError
from sborax.adapters.leaves import nest
from sborax.adapters.paths import Plan
from sborax.adapters.tree import Adapters, nodes
from sborax.procedures.procedure import Boundary, Run
from sborax.procedures.segment import AbstractSegmented, check_segments, fold, fresh


@dataclasses.dataclass(frozen=True)
class COLA(AbstractSegmented):
    """Tune, tie a knot (W <- W + s a b, in float32), extend: new a and b, a new optimiser. One chain over a run.

    - every: steps of a segment; the last may be shorter. The paper's chains have 1 to 3 segments; it does not say where
        the knots were. The learning rate goes on along the schedule of the whole run.
    - requantise: allow a quantised base, whose rounding errors then add up.
    - ranks: the rank of each link, never rising: `COLA(every=100, ranks=(8, 4, 2))`. Later links keep the last.
        The first must be the rank in the rules. None (default): all links have the rules' rank. The paper studies 8 in
        the first three of five epochs, then 2, 4, 6 or 8.

    A link of rank r begins as the method does with rank r, s = alpha / r included. Its leaves keep the width of the
    first link, filled with zeros that stay zero in training: the step is compiled once, and costs the time and memory
    of the first rank. What is trained, merged and written has the link's own rank. Adafactor counts the zeros in its
    means over a leaf.

    The function does not change at a knot, since b = 0 after it. Adapted kernels are held in float32. The rank of the
    total change is at most that of all links together. One segment is plain LoRA.
    """

    paper = "Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning, arXiv:2401.04151"

    every: int
    requantise: bool = False
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SboraxError(f"COLA: every must be at least 1 step, got {self.every}")
        ranks = self.ranks
        if ranks is not None and (not ranks or ranks[-1] < 1 or list(ranks) != sorted(ranks, reverse=True)):
            raise SboraxError(f"COLA: ranks must be at least 1 and never rise, got {ranks}")

    def check(self, run: Run, base: dict[str, Any]) -> None:
        check_segments(self, run, base, self.requantise)
        if self.ranks is None:
            return
        links = -(-run.steps // self.every)
        if len(self.ranks) > links:
            raise SboraxError(
                f"COLA: ranks names {len(self.ranks)} links, but with every={self.every} a run of {run.steps} steps "
                f"has {links}"
            )
        for site in run.plan.sites:
            for method in site.method.members if isinstance(site.method, ByLayer) else (site.method,):
                kind = type(method).__name__
                if not method.ragged:
                    raise SboraxError(f"COLA: {site.path}: {kind} has no rank that ranks= could lower; use LoRA")
                if method.rank != self.ranks[0]:
                    raise SboraxError(
                        f"COLA: {site.path}: the first link has the rank of the rules, {method.rank}, and ranks "
                        f"begins with {self.ranks[0]}; make them equal"
                    )
                for rank in self.ranks[1:]:
                    try:
                        _with_rank(method, rank).check(site.shape)
                    except SboraxError as error:
                        raise SboraxError(f"COLA: {site.path}: a link of rank {rank}: {error}") from None

    def due(self, step: int, run: Run) -> bool:
        return step % self.every == 0 and step < run.steps

    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        base = fold(boundary.base, boundary.adapters)
        return dataclasses.replace(boundary, adapters=self._link(key, step, run, base), base=base)

    def _link(self, key: Key[Array, ""], step: int, run: Run, base: dict[str, Any]) -> Adapters:
        """The link that begins after `step` steps."""
        if self.ranks is None:
            return fresh(key, run, base)
        rank = self.ranks[min(step // self.every, len(self.ranks) - 1)]
        sites = tuple(dataclasses.replace(site, method=_with_rank(site.method, rank)) for site in run.plan.sites)
        narrow = fresh(key, dataclasses.replace(run, plan=Plan(sites, run.plan.untouched)), base)
        wide = nodes(jax.eval_shape(functools.partial(fresh, key, run, base)))
        return nest({path: _padded(node, wide[path]) for path, node in nodes(narrow).items()})


def _with_rank(method: AbstractMethod, rank: int) -> AbstractMethod:
    if isinstance(method, ByLayer):
        return dataclasses.replace(method, parts=tuple(_with_rank(part, rank) for part in method.parts))
    changes: dict[str, Any] = {"rank": rank}
    return dataclasses.replace(method, **changes)  # type: ignore[type-var]


def _padded(node: Adapter, wide: Adapter) -> Adapter:
    """`node` with zeros behind its leaves, up to the shapes of `wide`, and with the structure of `wide`."""

    def pad(leaf: Array, like: jax.ShapeDtypeStruct) -> Array:
        # A scalar, such as the scale of a weight without a stack, has nothing to pad.
        widths = [(0, size - length) for length, size in zip(leaf.shape, like.shape, strict=True)]
        return jnp.pad(leaf, widths or 0)

    train, frozen = (jax.tree.map(pad, *pair) for pair in ((node.train, wide.train), (node.frozen, wide.frozen)))
    return Adapter(train, frozen, wide.method, wide.in_axes)
