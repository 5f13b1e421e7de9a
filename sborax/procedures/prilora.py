"""PRILoRA's pruning in training: the least important entries of a are set to zero every so often, arXiv:2401.11316."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from sborax.adapters.core import AbstractComposite, Adapter, SboraxError, width
from sborax.adapters.leaves import nest
from sborax.adapters.paths import STACKED_UNDER, Site
from sborax.adapters.tree import Adapters, nodes, stack_of
from sborax.methods.prilora import PRILoRA
from sborax.procedures.procedure import AbstractProcedure, Boundary, Run

Group = Literal["per_rank", "matrix"]


class PruningState(NamedTuple):
    """Running norms of the input features, and 0 where a persistent mask has pruned, by path of the kernel."""

    norms: dict[str, Float[Array, "*stack in"]]
    kept: dict[str, Float[Array, "*stack in rank"]]


@dataclasses.dataclass(frozen=True)
class PRILoRAPruning(AbstractProcedure):
    """Every so many steps, zero the entries of a where |a_ji| x_j is low, x_j a running norm of input feature j.

    fraction: of the entries of a in a group; default 0.5. every: steps between two prunings; default 40.
    beta: of the running input norms; default 0.9. group: entries are compared within each column of a ("per_rank",
    default) or all together ("matrix"). The defaults are remembered from the paper, not confirmed.

    Norms are those of a whole step, of the forward pass that is made anyway; padding does not count. Moments of the
    optimiser are left alone, so pruned entries may grow again, unless `PRILoRA` has a persistent mask.
    Raises SboraxError for a fraction or beta outside [0, 1), every below 1, an unknown group.
    """

    paper = "PRILoRA: Pruned and Rank-Increasing Low-Rank Adaptation, arXiv:2401.11316"
    resets = False
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
            updates: PyTree, state: Any, params: PyTree | None = None, *, norms: Any = None, **others: Any
        ) -> tuple[PyTree, PruningState]:
            running = {path: ema(old, norms[path], self.beta) for path, old in state.norms.items()}
            return updates, state._replace(norms=running)

        return optax.GradientTransformationExtraArgs(init, update)

    def start(self, key: Key[Array, ""], run: Run, boundary: Boundary) -> Boundary:
        return boundary

    def due(self, step: int, run: Run) -> bool:
        return step % self.every == 0

    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        found = nodes(boundary.adapters)

        def one(state: Any) -> Any:
            if not isinstance(state, PruningState):
                return state
            held = dict(state.kept)
            for path, norms in state.norms.items():
                node = _with_norm(found[path], norms)
                keep = _keep(node, self)
                found[path] = _pruned(node, keep)
                held |= {path: held[path] * keep} if path in held else {}
            return state._replace(kept=held)

        opt = jax.tree.map(one, boundary.opt, is_leaf=_is_state)
        return self.settle(dataclasses.replace(boundary, adapters=nest(found), opt=opt))

    def replay(
        self,
        key_of: Callable[[int], Key[Array, ""]],
        done: int,
        run: Run,
        boundary: Boundary,
        kept: Callable[[int], Adapters],
    ) -> Boundary:
        return self.settle(boundary)

    def settle(self, boundary: Boundary) -> Boundary:
        found = nodes(boundary.adapters)
        for state in filter(_is_state, jax.tree.leaves(boundary.opt, is_leaf=_is_state)):
            for path, norms in state.norms.items():
                node = found[path]
                # Zeros stay zeros: a mask that has been settled before does not change.
                mask = {"mask": node.frozen["mask"] * state.kept[path]} if path in state.kept else {}
                # A copy: the next step takes over the buffers of the optimiser's state.
                found[path] = _with_norm(
                    dataclasses.replace(node, frozen={**node.frozen, **mask}), jnp.array(norms, copy=True)
                )
        return dataclasses.replace(boundary, adapters=nest(found))

    def whole(self, segments: list[Adapters], run: Run) -> Adapters:
        return segments[-1]


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
    adapters: Adapters,
    norms: Mapping[str, Float[Array, "*stack in"]],
    step: Int[Array, ""] | int,
    pruning: PRILoRAPruning,
) -> Adapters:
    """The adapters after optimiser step number `step` (from 1): running norms updated, a pruned where it is due.

    norms: of input features in this step by path of the kernel, as `LanguageModel.collect` gives them. Moments of the
    optimiser are left alone, so pruned entries may grow again, unless the adapter has a mask. jit-able.
    Raises SboraxError if there is no PRILoRA adapter, one inside a composite, or one whose norms are missing.
    """
    found = nodes(adapters)
    for path, node in found.items():
        if isinstance(node.method, AbstractComposite) and _inside(node.method):
            raise SboraxError(f"{path}: {_ALONE}")
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


def _node(node: Adapter, norms: Array, step: Int[Array, ""] | int, pruning: PRILoRAPruning) -> Adapter:
    node = _with_norm(node, ema(node.frozen["norm"], norms, pruning.beta))
    due = (jnp.asarray(step) > 0) & (jnp.asarray(step) % pruning.every == 0)
    return _pruned(node, jax.lax.cond(due, lambda: _keep(node, pruning), lambda: jnp.ones_like(node.train["a"])))


def _with_norm(node: Adapter, norms: Float[Array, "*stack in"]) -> Adapter:
    return dataclasses.replace(node, frozen={**node.frozen, "norm": norms})


def _held(node: Adapter) -> Float[Array, "*stack in rank"]:
    """What a mask holds back counts as zero, whatever momentum made of it."""
    return node.train["a"] * node.frozen.get("mask", jnp.ones_like(node.train["a"]))


def _keep(node: Adapter, pruning: PRILoRAPruning) -> Float[Array, "*stack in rank"]:
    """0 where a is to be pruned by the node's own running norms, else 1."""
    stack, rank = stack_of(node), node.method.rank
    ranks = jnp.asarray(np.reshape(rank, stack) if isinstance(rank, tuple) else np.full(stack, rank), jnp.int32)

    def one(a: Array, own_norms: Array, own: Array) -> Array:
        return kept(a, own_norms, own, pruning.fraction, pruning.group)

    for _ in stack:
        one = jax.vmap(one)
    return one(_held(node), node.frozen["norm"], ranks).astype(jnp.float32)


def _pruned(node: Adapter, keep: Float[Array, "*stack in rank"]) -> Adapter:
    masks = {"mask": node.frozen["mask"] * keep} if "mask" in node.frozen else {}
    train = {**node.train, "a": _held(node) * keep}
    return dataclasses.replace(node, train=train, frozen={**node.frozen, **masks})


def _is_state(node: Any) -> bool:
    return isinstance(node, PruningState)


def _sites(run: Run) -> dict[str, Site]:
    return {site.path: site for site in run.plan.sites if isinstance(site.method, PRILoRA)}


_ALONE = "pruning needs PRILoRA alone on a whole stack, not inside a composition"
