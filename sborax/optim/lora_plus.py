"""LoRA+: a higher learning rate for b than for a, arXiv:2402.12354."""

from typing import Any

import jax
import optax
from jaxtyping import PyTree

from sborax.core import SboraxError, is_adapter

ONE_AXIS = ("scale", "bias")
"""Base leaves of one axis, stacks left out: scales of norms and biases."""


def groups(tree: PyTree) -> PyTree:
    """The group of every trained leaf, by PEFT's rules: "a", "b" or "b_no_decay".

    "b": leaves named b, and leaves of one axis (stacks left out) such as DoRA's m or the scale of a norm.
    "b_no_decay": biases, which weight decay should leave alone. "a": everything else.
    PEFT's fourth group is adapters of embedding tables, which sborax has not.
    """

    def of_adapter(axes: Any, leaves: Any) -> Any:
        def one(path: tuple, _: Any) -> str:
            names = [key.key for key in path]
            own: Any = axes
            for name in names:
                own = own[name]
            return "b" if names[-1] == "b" or len(own) == 1 else "a"

        return jax.tree_util.tree_map_with_path(one, leaves)

    def one(path: tuple, node: Any) -> Any:
        if is_adapter(node):
            train, frozen = (of_adapter(node.method.axes, leaves) for leaves in (node.train, node.frozen))
            return type(node)(train, frozen, node.method, node.in_axes)
        name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-1]
        if name in ONE_AXIS:
            return "b_no_decay" if name == "bias" else "b"
        return "a"

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_adapter)


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """The last link of a chain: updates of b, and of leaves of one axis, times `ratio`.

    lr_b = ratio * lr_a for every optimiser whose update is linear in its rate, decoupled weight decay included:
    `optax.chain(optax.adamw(lr), lora_plus(16.0))`.

    ratio: lr_b / lr_a, at least 1 (PEFT's example: 16; the harder the task the larger, with half the usual lr).
    Raises SboraxError for a ratio below 1. arXiv:2402.12354
    """
    if ratio < 1.0:
        raise SboraxError(f"lora_plus: ratio must be at least 1, got {ratio}")

    def update(updates: PyTree, params: PyTree | None = None) -> PyTree:
        def scaled(leaf: jax.Array, group: str) -> jax.Array:
            return leaf if group == "a" else ratio * leaf

        return jax.tree.map(scaled, updates, groups(updates))

    return optax.stateless(update)
