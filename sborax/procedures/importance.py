"""Importance of attention heads and MLP channels, scored by one of the criteria in `criteria`."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from sborax.adapters.core import Adapter
from sborax.adapters.paths import Site
from sborax.adapters.tree import over_stack, stack_of
from sborax.methods.masked import Masked
from sborax.procedures.criteria import AbstractCriterion, LoRAGradient
from sborax.procedures.in_place import adapters_by_path

BLOCKS: Mapping[str, Mapping[str, Literal["in", "out"]]] = {
    "self_attn": {"q_proj": "out", "k_proj": "out", "v_proj": "out", "o_proj": "in"},
    "mlp": {"gate_proj": "out", "up_proj": "out", "down_proj": "in"},
}
"""The side of each block's projections that is cut into groups. Outputs are masked; inputs follow from them."""


def block_of(path: str) -> tuple[str, str, str]:
    """`layers/self_attn/q_proj/kernel` -> (`layers/self_attn`, `self_attn`, `q_proj`)."""
    parent, _, module = path.removesuffix("/kernel").rpartition("/")
    return parent, parent.rpartition("/")[2], module


class LoRAPruneState(NamedTuple):
    """What pruning is decided by, by path of the block, `(*stack, groups)`.

    - scores: running importance of every group.
    - masks: 0 where a group is pruned, else 1.
    """

    scores: dict[str, Float[Array, "*stack groups"]]
    masks: dict[str, Float[Array, "*stack groups"]]


def group_scores(
    change: Float[Array, "in out"],
    weight: Float[Array, "in out"],
    side: Literal["in", "out"],
    groups: int,
    power: int = 1,
    normalise: bool = True,
) -> Float[Array, " groups"]:
    """sum over each group of |change * weight|^power, the groups' vector scaled to length 1 (plus 1e-8).

    Args:
    - change: gradient of the weight, or an estimate of it; ones for importance by magnitude.
    - side: the axis that is cut into `groups` runs of equal length.
    - normalise: False for the sums as they are.
    """
    channels = jnp.sum(jnp.abs(change * weight) ** power, axis=1 if side == "in" else 0)
    scores = jnp.sum(channels.reshape(groups, -1), axis=1)
    return scores / (jnp.linalg.norm(scores) + 1e-8) if normalise else scores


def _inner(node: Adapter) -> Adapter:
    return node.method.children(node)[0][0] if isinstance(node.method, Masked) else node


def block_scores(
    sites: Mapping[str, Site],
    groups: Mapping[str, int],
    adapters: Mapping[str, Adapter],
    grads: Mapping[str, Adapter],
    base: Mapping[str, Any],
    power: int,
    criterion: AbstractCriterion,
    base_grads: Mapping[str, Any] | None = None,
) -> dict[str, Float[Array, "*stack groups"]]:
    """The sum of the scores of a block's projections, for every block and layer.

    `sites`, `adapters`, `grads`, `base` and `base_grads` are by path of the kernel; `groups`, how many there are, by
    path of the block.
    """
    assert not criterion.full or base_grads is not None

    def score_layer(weight: Any, node: Adapter, grad: Any, *, side: Literal["in", "out"], count: int) -> Array:
        merged = node.method.merge(weight, node)
        return group_scores(criterion.factor(merged, node, grad), merged, side, count, power)

    totals: dict[str, Array] = {}
    for path, node in adapters.items():
        if path not in sites:
            continue
        parent, block, module = block_of(path)
        inner, grad = _inner(node), _inner(grads[path]).train
        if criterion.full and base_grads is not None:
            grad = {"kernel": base_grads[path]}
        scored = functools.partial(score_layer, side=BLOCKS[block][module], count=groups[parent])
        # One layer at a time: a dense gradient of every layer at once would be as large as the model.
        scores = over_stack(scored, stack_of(inner))(base[path], inner, grad)
        totals[parent] = totals[parent] + scores if parent in totals else scores
    return totals


def watch_importance(
    sites: Mapping[str, Site],
    groups: Mapping[str, int],
    decay: float = 0.9,
    power: int = 1,
    criterion: AbstractCriterion = LoRAGradient(),
) -> optax.GradientTransformationExtraArgs:
    """Passes gradients on, and keeps score <- decay score + (1 - decay) s of every group in its state.

    A step with a NaN in any score changes no score. `update` needs `params`, `frozen=` and `base=`, and `base_grads=`
    for a criterion that is `full`.
    """
    parents = {block_of(path)[0]: site.stack for path, site in sites.items()}

    def init(params: PyTree) -> LoRAPruneState:
        shapes = {parent: (*stack, groups[parent]) for parent, stack in parents.items()}
        return LoRAPruneState(
            {parent: jnp.zeros(shape) for parent, shape in shapes.items()},
            {parent: jnp.ones(shape) for parent, shape in shapes.items()},
        )

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        frozen: Any = None,
        base: Any = None,
        base_grads: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, LoRAPruneState]:
        train, grads = adapters_by_path(params), adapters_by_path(updates)
        adapters = {
            path: Adapter(train[path].train, node.frozen, node.method, node.in_axes)
            for path, node in adapters_by_path(frozen).items()
        }
        step_scores = block_scores(sites, groups, adapters, grads, base, power, criterion, base_grads)
        sound = jnp.all(jnp.stack([jnp.all(~jnp.isnan(leaf)) for leaf in step_scores.values()]))
        scores = {
            parent: jnp.where(sound, decay * state.scores[parent] + (1 - decay) * new, state.scores[parent])
            for parent, new in step_scores.items()
        }
        return updates, LoRAPruneState(scores, state.masks)

    return optax.GradientTransformationExtraArgs(init, update)
