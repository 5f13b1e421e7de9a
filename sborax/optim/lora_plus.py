"""LoRA+: a higher learning rate for b than for a, arXiv:2402.12354."""

import dataclasses
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from sborax.adapters.compose import with_parts
from sborax.adapters.core import AbstractComposite, Adapter, Leaves, SboraxError, is_adapter
from sborax.adapters.leaves import map_with_path
from sborax.adapters.tables import LOOKUP, TABLE

ONE_AXIS = ("scale", "bias")
"""Base leaves that have one axis apart from stacks: scales of norms, and biases."""


def groups(tree: PyTree) -> PyTree:
    """The group of every trained leaf, by PEFT's rules: "a", "b" or "b_no_decay".

    - "b": leaves of adapters that their method declares in `group_b`, and scales of norms.
    - "b_no_decay": biases, which should not decay.
    - "a": everything else, adapters of the embedding among them. PEFT gives those a learning rate of their own.
    """

    def group_of(path: str, node: Any) -> Any:
        if is_adapter(node):
            return jax.tree.map(lambda _: "a", node) if path.endswith((TABLE, LOOKUP)) else _of_adapter(node)
        name = path.split("/")[-1]
        if name in ONE_AXIS:
            return "b_no_decay" if name == "bias" else "b"
        return "a"

    return map_with_path(group_of, tree, is_leaf=is_adapter)


def _of_adapter(node: Adapter) -> Adapter:
    plain = jax.tree.map(lambda _: "a", node)
    return dataclasses.replace(plain, train=_like(node.train, _trained(node)))


def _trained(node: Adapter) -> Leaves:
    """The groups of all leaves that the method may train, by name, nested as a composite method nests them."""
    method = node.method
    if isinstance(method, AbstractComposite):
        parts = [dataclasses.replace(child, train=_trained(child)) for child, _ in method.children(node)]
        return with_parts(node, parts).train
    return {name: "b" if name in method.group_b else "a" for name in node.train}


def _like(leaves: Leaves, groups: Leaves) -> Leaves:
    """The groups of these leaves. An optimiser may have masked some."""
    return {
        name: _like(leaf, groups[name])
        if isinstance(leaf, dict)
        else jax.tree.map(lambda _, name=name: groups[name], leaf)
        for name, leaf in leaves.items()
    }


def lora_plus(ratio: float = 16.0) -> optax.GradientTransformation:
    """Multiplies the updates of the leaves in group b (see `groups`) by `ratio`. arXiv:2402.12354

    As the last link of a chain, `optax.chain(optax.adamw(lr), lora_plus(16.0))`, it makes lr_b = ratio * lr_a for every
    optimiser whose update, including decoupled weight decay, is linear in its learning rate.

    Args:
    - ratio: lr_b / lr_a, at least 1 (PEFT's example: 16; the harder the task the larger, with half the usual lr).

    Raises SboraxError for a ratio below 1, and in `init` if every leaf is in group "a".
    """
    if ratio < 1.0:
        raise SboraxError(f"lora_plus: ratio must be at least 1, got {ratio}")

    def init(params: PyTree) -> optax.EmptyState:
        if ratio > 1.0 and set(jax.tree.leaves(groups(params))) <= {"a"}:
            raise SboraxError(
                "b_ratio: no trained leaf is in LoRA+'s group b; use a method with factors a, b, or b_ratio=1"
            )
        return optax.EmptyState()

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, optax.EmptyState]:
        def scaled(leaf: jax.Array, group: str) -> jax.Array:
            return leaf if group == "a" else ratio * leaf

        return jax.tree.map(scaled, updates, groups(updates)), state

    return optax.GradientTransformation(init, update)
