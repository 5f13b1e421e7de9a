"""How much a model's loss depends on its attention heads and MLP channels, from the gradients of LoRA alone."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from sborax.adapters.core import Adapter
from sborax.adapters.paths import Site
from sborax.adapters.tree import nodes, over_stack, stack_of
from sborax.methods.masked import Masked

BLOCKS: Mapping[str, Mapping[str, Literal["in", "out"]]] = {
    "self_attn": {"q_proj": "out", "k_proj": "out", "v_proj": "out", "o_proj": "in"},
    "mlp": {"gate_proj": "out", "up_proj": "out", "down_proj": "in"},
}
"""For the projections of each block, on which side their groups are. Outputs are masked, inputs follow."""


def block_of(path: str) -> tuple[str, str, str]:
    """`layers/self_attn/q_proj/kernel` -> (`layers/self_attn`, `self_attn`, `q_proj`)."""
    parent, _, module = path.removesuffix("/kernel").rpartition("/")
    return parent, parent.rpartition("/")[2], module


class LoRAPruneState(NamedTuple):
    """scores: running importance of every group. masks: 0 where it is pruned. By block, `(*stack, groups)`."""

    scores: dict[str, Float[Array, "*stack groups"]]
    masks: dict[str, Float[Array, "*stack groups"]]


def lora_change(
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    grad_a: Float[Array, "in rank"],
    grad_b: Float[Array, "rank out"],
) -> Float[Array, "in out"]:
    """G = a grad_b + grad_a b - grad_a grad_b = a b - (a - grad_a)(b - grad_b): LoRA's stand-in for dL/dW."""
    with jax.default_matmul_precision("highest"):
        return a @ grad_b + grad_a @ (b - grad_b)


def group_scores(
    change: Float[Array, "in out"],
    weight: Float[Array, "in out"],
    side: Literal["in", "out"],
    groups: int,
    power: int = 1,
    normalise: bool = True,
) -> Float[Array, " groups"]:
    """sum over each group of |change * weight|^power, the groups' vector scaled to length 1 (plus 1e-8).

    change: gradient of the weight, or what stands for it; ones for importance by magnitude.
    side: which axis is cut into `groups` runs of equal length.
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
    metric: Literal["lora", "magnitude"],
) -> dict[str, Float[Array, "*stack groups"]]:
    """Sum of the scores of a block's projections, for every block and layer. All by the path of the kernel."""

    def one(weight: Any, node: Adapter, grad: Any, *, side: Literal["in", "out"], count: int) -> Array:
        merged = node.method.merge(weight, node)
        if metric == "lora":
            change = lora_change(node.train["a"], node.train["b"], grad["a"], grad["b"])
        else:
            change = jnp.ones_like(merged)
        return group_scores(change, merged, side, count, power)

    totals: dict[str, Array] = {}
    for path, node in adapters.items():
        if path not in sites:
            continue
        parent, block, module = block_of(path)
        inner, grad = _inner(node), _inner(grads[path]).train
        scored = functools.partial(one, side=BLOCKS[block][module], count=groups[parent])
        # One layer at a time: a dense gradient of every layer at once would be as large as the model.
        scores = over_stack(scored, stack_of(inner))(base[path], inner, grad)
        totals[parent] = totals[parent] + scores if parent in totals else scores
    return totals


def watch_importance(
    sites: Mapping[str, Site],
    groups: Mapping[str, int],
    decay: float = 0.9,
    power: int = 1,
    metric: Literal["lora", "magnitude"] = "lora",
) -> optax.GradientTransformationExtraArgs:
    """Lets gradients pass and keeps score <- decay score + (1 - decay) s of every group in its state.

    A step with a NaN in any score changes none. `update` needs `params`, `frozen=` and `base=`.
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
        **others: Any,
    ) -> tuple[PyTree, LoRAPruneState]:
        train, grads = _nodes(params), _nodes(updates)
        whole = {
            path: Adapter(train[path].train, node.frozen, node.method, node.in_axes)
            for path, node in _nodes(frozen).items()
        }
        fresh = block_scores(sites, groups, whole, grads, base, power, metric)
        sound = jnp.all(jnp.stack([jnp.all(~jnp.isnan(leaf)) for leaf in fresh.values()]))
        scores = {
            parent: jnp.where(sound, decay * state.scores[parent] + (1 - decay) * new, state.scores[parent])
            for parent, new in fresh.items()
        }
        return updates, LoRAPruneState(scores, state.masks)

    return optax.GradientTransformationExtraArgs(init, update)


def _nodes(tree: PyTree) -> dict[str, Adapter]:
    """Adapters by path, whether the tree is theirs alone or a training state's."""
    return {path.removeprefix("adapters/"): node for path, node in nodes(tree).items()}
