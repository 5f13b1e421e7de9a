"""PRILoRA's pruning in training: the least important entries of a are set to zero every so often, arXiv:2401.11316."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sborax.core import AbstractComposite, Adapter, SboraxError
from sborax.methods.prilora import PRILoRA
from sborax.tree import Adapters, nest, nodes, stack_of

Group = Literal["per_rank", "matrix"]


@dataclasses.dataclass(frozen=True)
class Pruning:
    """When and how much `after_step` prunes.

    fraction: of the entries of a in a group; default 0.5. every: steps between two prunings; default 40.
    beta: of the running input norms; default 0.9. group: entries are compared within each column of a ("per_rank",
    default) or all together ("matrix"). The defaults are remembered from the paper, not confirmed.
    Raises SboraxError for a fraction or beta outside [0, 1), every below 1, an unknown group.
    """

    fraction: float = 0.5
    every: int = 40
    beta: float = 0.9
    group: Group = "per_rank"

    def __post_init__(self) -> None:
        if not (0.0 <= self.fraction < 1.0 and 0.0 <= self.beta < 1.0):
            raise SboraxError(f"fraction and beta must lie in [0, 1), got {self.fraction} and {self.beta}")
        if self.every < 1 or self.group not in ("per_rank", "matrix"):
            raise SboraxError(f"needs every >= 1 and group 'per_rank' or 'matrix', got {self.every}, {self.group!r}")


def input_norms(x: Float[Array, "*batch in"], mask: Array | None = None) -> Float[Array, " in"]:
    """||X_j|| over all tokens of a batch, per input feature j, float32. mask: (*batch), zero at padding."""
    wide = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    if mask is not None:
        # Not by multiplication: padding may hold what is not finite.
        wide = jnp.where((mask != 0).reshape(-1, 1), wide, 0.0)
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=0))


def ema(old: Float[Array, "..."], new: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """beta old + (1 - beta) new."""
    return beta * old + (1.0 - beta) * new


def kept(
    a: Float[Array, "in rank"], norms: Float[Array, " in"], own: Int[Array, ""], fraction: float, group: Group
) -> Bool[Array, "in rank"]:
    """False at the floor(fraction * size) least important entries of every group; importance |a_ji| norms_j.

    own: how many columns of a are in use. Of equals the first go. Norms that are all zero prune nothing.
    """
    fan_in, padded = a.shape
    score = jnp.abs(a) * norms[:, None]
    if group == "per_rank":
        place = jnp.argsort(jnp.argsort(score, axis=0), axis=0)
        gone = place < math.floor(fraction * fan_in)
    else:
        score = jnp.where((jnp.arange(padded) < own)[None, :], score, jnp.inf)
        place = jnp.argsort(jnp.argsort(score.reshape(-1))).reshape(score.shape)
        gone = place < jnp.floor(fraction * fan_in * own.astype(jnp.float32)).astype(place.dtype)
    return ~gone | ~jnp.any(norms > 0)


def after_step(
    adapters: Adapters, norms: Mapping[str, Float[Array, "*stack in"]], step: Int[Array, ""] | int, pruning: Pruning
) -> Adapters:
    """The adapters after optimiser step number `step` (from 1): running norms updated, a pruned where it is due.

    norms: `input_norms` of this step by path of the kernel, as `LanguageModel.input_norms` gives. jit-able. Moments of
    the optimiser are left alone, so pruned entries may grow again, unless the adapter has a mask.
    Raises SboraxError if there is no PRILoRA adapter, one inside a composite, or one whose norms are missing.
    """
    found = nodes(adapters)
    for path, node in found.items():
        if isinstance(node.method, AbstractComposite) and _inside(node.method):
            raise SboraxError(f"{path}: pruning needs PRILoRA alone on a whole stack, not inside a composition")
    own = {path: node for path, node in found.items() if isinstance(node.method, PRILoRA)}
    if not own:
        raise SboraxError("no adapter is PRILoRA: there is nothing to prune")
    missing = sorted(set(own) - set(norms))
    if missing:
        raise SboraxError(f"{missing[0]}: there are no input norms for this adapter")
    return nest(found | {path: _node(node, norms[path], step, pruning) for path, node in own.items()})


def _inside(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_inside(item) for item in value)
    if isinstance(value, AbstractComposite):
        return any(_inside(getattr(value, field.name)) for field in dataclasses.fields(value))  # type: ignore[arg-type]
    return isinstance(value, PRILoRA)


def _node(node: Adapter, norms: Array, step: Int[Array, ""] | int, pruning: Pruning) -> Adapter:
    stack, rank = stack_of(node), node.method.rank
    running = ema(node.frozen["norm"], norms, pruning.beta)
    ranks = jnp.asarray(np.reshape(rank, stack) if isinstance(rank, tuple) else np.full(stack, rank), jnp.int32)

    def one(a: Array, own_norms: Array, own: Array) -> Array:
        return kept(a, own_norms, own, pruning.fraction, pruning.group)

    for _ in stack:
        one = jax.vmap(one)
    # What a mask holds back counts as zero, whatever momentum made of it.
    a = node.train["a"] * node.frozen.get("mask", jnp.ones_like(node.train["a"]))
    due = (jnp.asarray(step) > 0) & (jnp.asarray(step) % pruning.every == 0)
    keep = jax.lax.cond(due, lambda: one(a, running, ranks), lambda: jnp.ones(a.shape, bool)).astype(jnp.float32)
    frozen = {**node.frozen, "norm": running}
    if "mask" in frozen:
        frozen["mask"] = frozen["mask"] * keep
    return dataclasses.replace(node, train={**node.train, "a": a * keep}, frozen=frozen)
