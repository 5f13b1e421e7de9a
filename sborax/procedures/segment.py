"""Procedures that merge trained adapters into the base and start others: chains and boosters."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sborax.adapters.arithmetic import by_layer, joined, scale_adapter
from sborax.adapters.compose import ByLayer
from sborax.adapters.core import AbstractFactored, AbstractWeight, Adapter, SboraxError, structure
from sborax.adapters.leaves import nest
from sborax.adapters.paths import Site
from sborax.adapters.rebase import encode
from sborax.adapters.tree import Adapters, attach, merge, nodes, stack_of
from sborax.methods.lora import LoRA
from sborax.optim.pairs import over_pairs
from sborax.procedures.procedure import AbstractProcedure, Boundary, Run


class AbstractSegmented(AbstractProcedure):
    """A procedure that merges each segment of a run into the base and continues with new adapters.

    Segments are kept: a resumed run merges them again, and together they are one LoRA on the original base.
    """

    resets = True
    folds = True
    rate: float = 1.0
    """What a segment is multiplied by when it is merged."""

    def start(self, key: Key[Array, ""], run: Run, boundary: Boundary) -> Boundary:
        return dataclasses.replace(boundary, base=widened(boundary.base, run))

    def replay(
        self,
        key_of: Callable[[int], Key[Array, ""]],
        done: int,
        run: Run,
        boundary: Boundary,
        adapters_after: Callable[[int], Adapters],
    ) -> Boundary:
        for step in range(1, done + 1):
            if self.due(step, run):
                before = dataclasses.replace(boundary, adapters=adapters_after(step))
                boundary = self.apply(key_of(step), step, run, before)
        return boundary

    def joined(self, segments: list[Adapters], run: Run) -> Adapters:
        # The last segment was never merged: the trained model has it at full size.
        return join_segments(segments, [self.rate] * (len(segments) - 1) + [1.0], run)


def check_segments(procedure: AbstractProcedure, run: Run, base: dict[str, Any], requantise: bool) -> None:
    """Raise SboraxError unless every adapted weight can be merged into, again and again."""
    name = type(procedure).__name__
    if not run.plan.sites:
        raise SboraxError(f"{name}: nothing is adapted; give rules")
    for site in run.plan.sites:
        if site.path not in base:
            raise SboraxError(f"{name}: {site.path} is tied or trained itself, so that nothing can be merged into it")
        # Methods that share a stack by layers are merged each on its own.
        for method in site.method.members if isinstance(site.method, ByLayer) else (site.method,):
            kind = type(method).__name__
            if not isinstance(method, AbstractFactored) or not method.identity_at_init or method.needs:
                raise SboraxError(f"{name}: {site.path}: {kind} is no plain product that starts at zero; use LoRA")
            if method.rewrites_base:
                raise SboraxError(f"{name}: {site.path}: {kind} rewrites the base at every start; use LoRA")
        if isinstance(base[site.path], AbstractWeight) and not requantise:
            raise SboraxError(
                f"{name}: {site.path}: each merge into a quantised weight rounds again, and the errors add up; "
                "use a dense base, or requantise=True to accept that"
            )


def widened(base: dict[str, Any], run: Run) -> dict[str, Any]:
    """`base` with float32 copies of the adapted kernels, since bfloat16 would round a segment away."""
    wide = {site.path: base[site.path] for site in run.plan.sites}
    return base | {
        path: leaf if isinstance(leaf, AbstractWeight) else leaf.astype(jnp.float32) for path, leaf in wide.items()
    }


@jax.jit
def _folded(weight: Any, node: Adapter, rate: Float[Array, ""]) -> Any:
    scaled = scale_adapter(node, rate, stack_of(node))
    merged = merge({"kernel": weight}, {"kernel": scaled})["kernel"]
    if not isinstance(weight, AbstractWeight):
        return merged
    return encode(weight, merged, jnp.any(merged != weight.dense(), axis=(-2, -1)))


def fold(base: dict[str, Any], adapters: Adapters, rate: float = 1.0) -> dict[str, Any]:
    """`base` with rate * delta added to every adapted kernel."""
    return base | {path: _folded(base[path], node, jnp.float32(rate)) for path, node in nodes(adapters).items()}


def fresh(key: Key[Array, ""], run: Run, base: dict[str, Any]) -> Adapters:
    """New adapters of the run, as `attach` makes them with this key."""
    return attach(key, nest(base), run.plan)[1]


def join_segments(segments: Sequence[Adapters], rates: Sequence[float], run: Run) -> Adapters:
    """One LoRA whose delta is sum_j rate_j delta_j: the factors side by side, those that are zero left out.

    Its rank is that of the sum, layer by layer; it stands on the base before the first merge.
    """
    flat = [nodes(segment) for segment in segments]
    return nest({site.path: _join(site, [adapters[site.path] for adapters in flat], rates) for site in run.plan.sites})


def _join(site: Site, segments: Sequence[Adapter], rates: Sequence[float]) -> Adapter:
    """`join_segments` of the adapters of one kernel."""
    factors_of_parts = []
    rated = zip(segments, rates, strict=True)
    for part, layers, rate in ((*part, rate) for node, rate in rated for part in by_layer(node)):
        method = part.method
        assert isinstance(method, AbstractFactored)
        factors = over_pairs(functools.partial(method.factors, shape=site.shape), len(site.stack))(part)
        a, b = (np.asarray(leaf, np.float32).reshape(-1, *leaf.shape[-2:]) for leaf in factors)
        acts = np.ones(len(a), bool) if layers is None else np.isin(np.arange(len(a)), layers)
        factors_of_parts.append((np.float32(rate) * a * acts[:, None, None], b))
    a = np.concatenate([a for a, _ in factors_of_parts], axis=2)
    b = np.concatenate([b for _, b in factors_of_parts], axis=1)
    mask = a.any(axis=1) & b.any(axis=2)
    ranks = np.maximum(mask.sum(axis=1), 1)
    # Live columns first, in their order; the tail beyond the largest rank is zero in every layer.
    order = np.argsort(~mask, axis=1, kind="stable")[:, : ranks.max()]
    live = np.take_along_axis(mask, order, axis=1)
    a = np.take_along_axis(a, order[:, None, :], axis=2) * live[:, None, :]
    b = np.take_along_axis(b, order[:, :, None], axis=1) * live[:, :, None]
    rank = int(ranks[0]) if len(set(ranks.tolist())) == 1 else tuple(ranks.tolist())
    train = {name: jnp.asarray(leaf.reshape(*site.stack, *leaf.shape[1:])) for name, leaf in (("a", a), ("b", b))}
    scale = jnp.ones(site.stack, jnp.float32)
    node = Adapter(train, {"scale": scale}, structure(LoRA(rank=rank)), site.in_axes)
    if not isinstance(site.method, ByLayer):
        return node
    adapted = sorted(layer for layers in site.method.layers for layer in layers)
    return joined([node], [tuple(adapted)], site.stack)
