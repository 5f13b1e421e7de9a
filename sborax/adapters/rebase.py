"""One adapter and its base weight: rewriting the base, leaves that depend on the base, and noticing a wrong base."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sborax.adapters.bank import AbstractBanked
from sborax.adapters.compose import TAKEN, with_parts
from sborax.adapters.constraints import replicate
from sborax.adapters.core import (
    AbstractComposite,
    AbstractMethod,
    AbstractWeight,
    Adapter,
    Leaves,
    SboraxError,
    Weight,
    dense,
    matmul,
)
from sborax.adapters.depth import over_stack, stack_of

LEFT = "left"
"""A frozen leaf of methods that rewrite the base: <W, s a0 b0> / |s a0 b0|^2 of the rewritten base W.

For the original base, W + s a0 b0, the number is larger by 1, however the two are rounded. That tells them apart.
"""


def as_matrix(weight: Any, stack: int, in_axes: int) -> Any:
    """A kernel as `(*stack, in, out)`."""
    if isinstance(weight, AbstractWeight):
        return weight
    sizes = weight.shape[stack:]
    return weight.reshape(*weight.shape[:stack], math.prod(sizes[:in_axes]), math.prod(sizes[in_axes:]))


@jax.jit
def rewrite(weight: Weight, node: Adapter) -> Weight:
    """The rewritten base of an adapter, from the original one: W <- W - s a0 b0, part by part.

    `attach`, and all code that loads adapters, run this same program, so all get the same bits. Layers that no part
    rewrites keep their bits, quantised or not.

    Raises SboraxError for a method that rewrites the base but has no leaves `a0`, `b0`, `scale`.
    """
    stack = stack_of(node)

    def rewrite_layer(layer: Array, kernel: Any, adapter: Adapter) -> tuple[Array, Array]:
        kernel, adapter = replicate((kernel, adapter))
        original = dense(kernel).astype(jnp.float32)
        residual = _residual(original, adapter, layer)
        # Rounded once at the end, however many parts there are.
        new = residual if isinstance(kernel, AbstractWeight) else residual.astype(kernel.dtype)
        return new, jnp.any(residual != original)

    layers = jnp.arange(math.prod(stack)).reshape(stack)
    with jax.default_matmul_precision("highest"):
        new, changed = over_stack(rewrite_layer, stack)(layers, as_matrix(weight, len(stack), node.in_axes), node)
    return encode(weight, new, changed) if isinstance(weight, AbstractWeight) else new.reshape(weight.shape)


def encode(
    weight: AbstractWeight, new: Float[Array, "*stack in out"], changed: Bool[Array, "*stack"]
) -> AbstractWeight:
    """`weight` with new values in the layers that changed. Quantising is not idempotent, so others keep their bits."""

    def changed_layers(leaf: Array, old: Array) -> Array:
        return jnp.where(changed.reshape(*changed.shape, *[1] * (leaf.ndim - changed.ndim)), leaf, old)

    return jax.tree.map(changed_layers, weight.encode(new), weight)


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
    """Whether the adapted function depends on a frozen leaf that is computed from the base."""
    if isinstance(method, AbstractComposite):
        return any(reads_base(part) for part in method.members)
    return bool(method.base_leaves)


def rebase(weight: Weight, node: Adapter, banks: Mapping[str, Leaves] | None = None) -> Adapter:
    """The adapter with the frozen leaves that depend on the base computed from `weight`, its base from now on.

    The same program computes them wherever an adapter meets a base: on the same base they have the same bits.

    - banks: the leaves of the banks that it reads, by the bank's name.
    """
    return _rebase(weight, node, dict(banks or {})) if node.method.rewrites_base or reads_base(node.method) else node


@jax.jit
def _rebase(weight: Weight, node: Adapter, banks: dict[str, Leaves]) -> Adapter:
    def frozen_of_layer(kernel: Any, adapter: Adapter) -> Leaves:
        return _rebase_layer(*replicate((kernel, adapter, banks))).frozen

    stack = stack_of(node)
    with jax.default_matmul_precision("highest"):
        frozen = over_stack(frozen_of_layer, stack)(as_matrix(weight, len(stack), node.in_axes), node)
    return dataclasses.replace(node, frozen=frozen)


def _rebase_layer(weight: Weight, node: Adapter, banks: Mapping[str, Leaves]) -> Adapter:
    if isinstance(node.method, AbstractComposite):
        return with_parts(node, [_rebase_layer(weight, child, banks) for child, _ in node.method.children(node)])
    frozen = node.frozen
    if isinstance(node.method, AbstractBanked) and node.method.base_leaves:
        frozen = {**banks.get(node.method.bank_name, {}), **frozen}
        if not node.method.bank_leaves <= frozen.keys():
            raise SboraxError(f"{type(node.method).__name__} reads a bank, which these adapters lack")
    leaves = {name: leaf(weight, frozen) for name, leaf in node.method.base_leaves.items()}
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
    """Whether `weight` is not the base that the adapter left when it was attached: the original base, say.

    False for adapters that rewrite nothing, and for those without the leaf `left`.
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
