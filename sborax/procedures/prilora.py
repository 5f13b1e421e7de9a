"""PRILoRA's pruning: every so many steps the least important entries of a are set to zero, arXiv:2401.11316."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from sborax.adapters.core import AbstractComposite, Adapter, SboraxError, pair_of, width
from sborax.adapters.leaves import nest
from sborax.adapters.paths import STACKED_UNDER, Site
from sborax.adapters.tree import nodes, stack_of
from sborax.methods.prilora import PRILoRA
from sborax.procedures.in_place import AbstractInPlace, find_state, replace_state
from sborax.procedures.procedure import Boundary, Run

Group = Literal["per_rank", "matrix"]


class PruningState(NamedTuple):
    """What pruning is decided by, by path of the kernel.

    - norms: running norms of the input features.
    - kept: 0 where a persistent mask has pruned, else 1; only kernels with such a mask are there.
    """

    norms: dict[str, Float[Array, "*stack in"]]
    kept: dict[str, Float[Array, "*stack in rank"]]


@dataclasses.dataclass(frozen=True)
class PRILoRAPruning(AbstractInPlace):
    """Every so many steps, zero the entries of a where |a_ji| x_j is low, x_j a running norm of input feature j.

    - fraction: share of the entries of a in a group that are pruned; default 0.5.
    - every: steps between two prunings; default 40.
    - beta: of the running input norms; default 0.9.
    - group: "per_rank" (default) compares entries within each column of a, "matrix" all of them together.

    The defaults were not checked against the paper. Norms are taken in the forward pass of the step, over all
    its microbatches; padding does not count. Moments of the optimiser are left alone, so pruned entries may grow again,
    unless `PRILoRA` has a persistent mask.
    Raises SboraxError for a fraction or beta outside [0, 1), every below 1, an unknown group.
    """

    paper = "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation, arXiv:2401.11316"
    observes = True

    fraction: float = 0.5
    every: int = 40
    beta: float = 0.9
    group: Group = "per_rank"

    def __post_init__(self) -> None:
        if not (0.0 <= self.fraction < 1.0 and 0.0 <= self.beta < 1.0):
            raise SboraxError(f"fraction and beta must lie in [0, 1), got {self.fraction} and {self.beta}")
        if self.every < 1 or self.group not in ("per_rank", "matrix"):
            raise SboraxError(f"needs every >= 1 and group 'per_rank' or 'matrix', got {self.every}, {self.group!r}")

    def check(self, run: Run, base: dict[str, Any]) -> None:
        for site in run.plan.sites:
            if isinstance(site.method, AbstractComposite) and _inside(site.method):
                raise SboraxError(f"PRILoRAPruning: {site.path}: {_ALONE}")
        if not _sites(run):
            raise SboraxError("PRILoRAPruning: no rule gives PRILoRA: there is nothing to prune")
        if self.every > run.steps:
            raise SboraxError(
                f"PRILoRAPruning: every={self.every} would prune nothing in a run of {run.steps} steps; lower it"
            )
        outside = [path for path in _sites(run) if STACKED_UNDER not in path.split("/")]
        if outside:
            raise SboraxError(
                f"PRILoRAPruning: {outside[0]}: input norms are those of the layers alone; use LoRA there"
            )

    def watch(self, run: Run) -> optax.GradientTransformationExtraArgs:
        sites = _sites(run)

        def init(params: PyTree) -> PruningState:
            norms = {path: jnp.zeros((*site.stack, site.shape[0])) for path, site in sites.items()}
            return PruningState(
                norms,
                {
                    path: jnp.ones((*site.stack, site.shape[0], width(site.method.rank)))
                    for path, site in sites.items()
                    if isinstance(site.method, PRILoRA) and site.method.persistent_mask
                },
            )

        def update(
            updates: PyTree, state: Any, params: PyTree | None = None, *, norms: Any = None, **extra_args: Any
        ) -> tuple[PyTree, PruningState]:
            running = {path: ema(old, norms[path], self.beta) for path, old in state.norms.items()}
            return updates, state._replace(norms=running)

        return optax.GradientTransformationExtraArgs(init, update)

    def due(self, step: int, run: Run) -> bool:
        return step % self.every == 0

    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        adapters, state = nodes(boundary.adapters), find_state(boundary.opt, PruningState)
        assert state is not None
        masks = dict(state.kept)
        for path, norms in state.norms.items():
            node = _with_norm(adapters[path], norms)
            keep = _keep(node, self)
            adapters[path] = _pruned(node, keep)
            if path in masks:
                masks[path] = masks[path] * keep
        opt = replace_state(boundary.opt, state._replace(kept=masks))
        return self.settle(dataclasses.replace(boundary, adapters=nest(adapters), opt=opt))

    def settle(self, boundary: Boundary) -> Boundary:
        adapters, state = nodes(boundary.adapters), find_state(boundary.opt, PruningState)
        assert state is not None
        for path, norms in state.norms.items():
            node = adapters[path]
            # Zeros stay zeros: a mask that has been settled before does not change.
            mask = {"mask": node.frozen["mask"] * state.kept[path]} if path in state.kept else {}
            # A copy: the next step takes over the buffers of the optimiser's state.
            adapters[path] = _with_norm(
                dataclasses.replace(node, frozen={**node.frozen, **mask}), jnp.array(norms, copy=True)
            )
        return dataclasses.replace(boundary, adapters=nest(adapters))


def ema(old: Float[Array, "..."], new: Float[Array, "..."], beta: float) -> Float[Array, "..."]:
    """beta old + (1 - beta) new."""
    return beta * old + (1.0 - beta) * new


def kept(
    a: Float[Array, "in rank"], norms: Float[Array, " in"], rank: Int[Array, ""], fraction: float, group: Group
) -> Bool[Array, "in rank"]:
    """False at the floor(fraction * size) least important entries of every group; importance |a_ji| norms_j.

    Ties: the earlier entry is pruned. Norms that are all zero prune nothing.

    Args:
    - rank: how many columns of a are in use; the others are padding.
    """
    fan_in, columns = a.shape
    score = jnp.abs(a) * norms[:, None]
    if group == "per_rank":
        place = jnp.argsort(jnp.argsort(score, axis=0), axis=0)
        pruned = place < math.floor(fraction * fan_in)
    else:
        score = jnp.where((jnp.arange(columns) < rank)[None, :], score, jnp.inf)
        place = jnp.argsort(jnp.argsort(score.reshape(-1))).reshape(score.shape)
        pruned = place < jnp.floor(fraction * fan_in * rank.astype(jnp.float32)).astype(place.dtype)
    return ~pruned | ~jnp.any(norms > 0)


def _inside(value: Any) -> bool:
    """Whether a method, or a part of it, is PRILoRA."""
    if isinstance(value, tuple):
        return any(_inside(item) for item in value)
    if isinstance(value, AbstractComposite):
        return any(_inside(getattr(value, field.name)) for field in dataclasses.fields(value))  # type: ignore[arg-type]
    return isinstance(value, PRILoRA)


def _with_norm(node: Adapter, norms: Float[Array, "*stack in"]) -> Adapter:
    return dataclasses.replace(node, frozen={**node.frozen, "norm": norms})


def _held(node: Adapter) -> Float[Array, "*stack in rank"]:
    """a with zeros where a mask has pruned, whatever momentum has made of these entries."""
    return pair_of(node).a


def _keep(node: Adapter, pruning: PRILoRAPruning) -> Float[Array, "*stack in rank"]:
    """0 where a is to be pruned by the node's own running norms, else 1."""
    stack, rank = stack_of(node), node.method.rank
    ranks = jnp.asarray(np.reshape(rank, stack) if isinstance(rank, tuple) else np.full(stack, rank), jnp.int32)

    def keep_layer(a: Array, norms: Array, rank: Array) -> Array:
        return kept(a, norms, rank, pruning.fraction, pruning.group)

    for _ in stack:
        keep_layer = jax.vmap(keep_layer)
    return keep_layer(_held(node), node.frozen["norm"], ranks).astype(jnp.float32)


def _pruned(node: Adapter, keep: Float[Array, "*stack in rank"]) -> Adapter:
    masks = {"mask": node.frozen["mask"] * keep} if "mask" in node.frozen else {}
    train = {**node.train, "a": _held(node) * keep}
    return dataclasses.replace(node, train=train, frozen={**node.frozen, **masks})


def _sites(run: Run) -> dict[str, Site]:
    return {site.path: site for site in run.plan.sites if isinstance(site.method, PRILoRA)}


_ALONE = "pruning needs PRILoRA alone on a whole stack, not inside a composition"
