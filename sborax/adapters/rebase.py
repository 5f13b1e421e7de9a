"""One adapter and the weight it stands on: the base that it leaves, its leaves that follow from it, and a wrong one."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sborax.adapters.compose import TAKEN, with_parts
from sborax.adapters.constraints import whole
from sborax.adapters.core import (
    AbstractComposite,
    AbstractMethod,
    AbstractWeight,
    Adapter,
    SboraxError,
    Weight,
    dense,
    matmul,
)
from sborax.adapters.depth import over_stack, stack_of

LEFT = "left"
"""The frozen leaf <W, s a0 b0> / |s a0 b0|^2 of the base W that such a method left. It is larger by 1 for the base
before, whatever the two are rounded to."""


def as_matrix(weight: Any, stack: int, in_axes: int) -> Any:
    """A kernel as `(*stack, in, out)`."""
    if isinstance(weight, AbstractWeight):
        return weight
    own = weight.shape[stack:]
    return weight.reshape(*weight.shape[:stack], math.prod(own[:in_axes]), math.prod(own[in_axes:]))


@jax.jit
def rewrite(weight: Weight, node: Adapter) -> Weight:
    """The base that an adapter stands on, from the original one: W <- W - s a0 b0, part by part.

    One program makes it for `attach` and for all who load the leaves later, so both have the same bits. Layers of which
    no part takes anything keep theirs, quantised or not.

    Raises SboraxError for a method that rewrites the base and keeps no `a0`, `b0`, `scale` to do it again.
    """
    stack = stack_of(node)

    def one(layer: Array, own: Any, adapter: Adapter) -> tuple[Array, Array]:
        own, adapter = whole((own, adapter))
        before = dense(own).astype(jnp.float32)
        residual = _residual(before, adapter, layer)
        # Rounded once at the end, however many parts there are.
        new = residual if isinstance(own, AbstractWeight) else residual.astype(own.dtype)
        return new, jnp.any(residual != before)

    layers = jnp.arange(math.prod(stack)).reshape(stack)
    with jax.default_matmul_precision("highest"):
        new, changed = over_stack(one, stack)(layers, as_matrix(weight, len(stack), node.in_axes), node)
    return encode(weight, new, changed) if isinstance(weight, AbstractWeight) else new.reshape(weight.shape)


def encode(
    weight: AbstractWeight, new: Float[Array, "*stack in out"], changed: Bool[Array, "*stack"]
) -> AbstractWeight:
    """`weight` with other values in the layers that changed. Quantising is not idempotent, so the others are left."""

    def one(leaf: Array, old: Array) -> Array:
        return jnp.where(changed.reshape(*changed.shape, *[1] * (leaf.ndim - changed.ndim)), leaf, old)

    return jax.tree.map(one, weight.encode(new), weight)


def _residual(weight: Float[Array, "in out"], node: Adapter, layer: Array) -> Float[Array, "in out"]:
    if not node.method.rewrites_base:
        return weight
    if isinstance(node.method, AbstractComposite):
        for child, layers in node.method.children(node):
            new = _residual(weight, child, layer)
            weight = new if layers is None else jnp.where(jnp.isin(layer, np.asarray(layers)), new, weight)
        return weight
    if not set(node.frozen) >= TAKEN:
        raise SboraxError(f"{type(node.method).__name__} rewrites the base and keeps no a0, b0, scale to do it again")
    return weight - jnp.matmul(node.frozen["scale"] * node.frozen["a0"], node.frozen["b0"])


def reads_base(method: AbstractMethod) -> bool:
    """Whether the adapted function depends on a frozen leaf that follows from the base."""
    if isinstance(method, AbstractComposite):
        return any(reads_base(part) for part in method.members)
    return bool(method.base_leaves)


def rebase(weight: Weight, node: Adapter) -> Adapter:
    """The adapter with the leaves that follow from its base taken from `weight`, the base as it stands there.

    One program makes them wherever an adapter meets a base: on the same base they are the same bits.
    """
    return _rebase(weight, node) if node.method.rewrites_base or reads_base(node.method) else node


@jax.jit
def _rebase(weight: Weight, node: Adapter) -> Adapter:
    def one(own: Any, adapter: Adapter) -> Adapter:
        return _on(*whole((own, adapter)))

    stack = stack_of(node)
    with jax.default_matmul_precision("highest"):
        frozen = over_stack(lambda own, adapter: one(own, adapter).frozen, stack)(
            as_matrix(weight, len(stack), node.in_axes), node
        )
    return dataclasses.replace(node, frozen=frozen)


def _on(weight: Weight, node: Adapter) -> Adapter:
    if isinstance(node.method, AbstractComposite):
        return with_parts(node, [_on(weight, child) for child, _ in node.method.children(node)])
    leaves = {name: leaf(weight, node.frozen) for name, leaf in node.method.base_leaves.items()}
    if _knows_base(node.method):
        leaves[LEFT] = _left(weight, node)
    return dataclasses.replace(node, frozen={**node.frozen, **leaves})


def _knows_base(method: AbstractMethod) -> bool:
    return method.rewrites_base and LEFT in method.axes


def _left(weight: Weight, node: Adapter) -> Float[Array, ""]:
    """<W, s a0 b0> / |s a0 b0|^2, without forming a0 b0."""
    a, b = node.frozen["scale"] * node.frozen["a0"], node.frozen["b0"]
    square = jnp.sum((a.T @ a) * (b @ b.T))
    return jnp.sum(matmul(a.T, weight) * b) / jnp.maximum(square, jnp.finfo(jnp.float32).tiny)


@jax.jit
def astray(weight: Weight, node: Adapter) -> Bool[Array, ""]:
    """Whether the node stands on another weight than it left: that before it was attached, say.

    Adapters that rewrite nothing stand anywhere, and of those without the leaf `left` it is not known.
    """
    stack = stack_of(node)
    layers = jnp.arange(math.prod(stack)).reshape(stack)
    with jax.default_matmul_precision("highest"):
        return jnp.any(over_stack(_astray, stack)(layers, as_matrix(weight, len(stack), node.in_axes), node))


def _astray(layer: Array, weight: Weight, node: Adapter) -> Bool[Array, ""]:
    wrong = jnp.zeros((), bool)
    if isinstance(node.method, AbstractComposite):
        for child, layers in node.method.children(node):
            acts = True if layers is None else jnp.isin(layer, np.asarray(layers))
            wrong |= _astray(layer, weight, child) & acts
    elif node.method.rewrites_base and LEFT in node.frozen:
        wrong = jnp.abs(_left(weight, node) - node.frozen[LEFT]) > 0.5
    return wrong
