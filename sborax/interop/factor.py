"""Adapters of single layers, and their change of the base as thin factors: exact, or else truncated."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sborax.adapters.compose import Scaled, Sum, with_fields, with_parts
from sborax.adapters.core import AbstractComposite, AbstractFactored, Adapter, leaf_axes

Factors = tuple[np.ndarray, np.ndarray]
"""`(a, b)`, float32, a (in, rank) and b (rank, out)."""


def by_layer(node: Adapter, depth: int | None) -> Iterator[tuple[int | None, Adapter]]:
    """Yield `(layer, adapter)` for every adapted layer of a stack, without stack axis and without padding.

    Where several methods share a stack, each layer comes with the method that acts on it.

    Args:
    - node: the adapter of one kernel.
    - depth: number of stacked layers; None for a kernel without a stack, which yields `(None, adapter)`.
    """
    if isinstance(node.method, AbstractComposite):
        children = node.method.children(node)
        if all(layers is not None for _, layers in children):
            for child, layers in children:
                yield from ((i, adapter) for i, adapter in by_layer(child, depth) if i in (layers or ()))
            return
    for layer in [None] if depth is None else range(depth):
        yield layer, _trimmed(jax.tree.map(lambda leaf, i=layer: leaf if i is None else leaf[i], node), layer)


def _trimmed(node: Adapter, layer: int | None) -> Adapter:
    """One layer's adapter without the columns that pad it to the largest rank of its stack."""
    method = node.method
    if isinstance(method, AbstractComposite):
        return with_parts(node, [_trimmed(child, layer) for child, _ in method.children(node)])
    if layer is None or not isinstance(method.rank, tuple):
        return node
    rank = method.rank[layer]

    def cut(leaves):
        axes = leaf_axes(method.axes, leaves)
        return {
            name: leaf[tuple(slice(rank) if axis == "rank" else slice(None) for axis in axes[name])]
            for name, leaf in leaves.items()
        }

    return Adapter(cut(node.train), cut(node.frozen), with_fields(method, rank=rank), node.in_axes)


def exact(node: Adapter, shape: tuple[int, int]) -> Factors | None:
    """Thin factors of the change of the original base: W' - W = a b. None for a method that has none.

    Args:
    - node: the adapter of one layer, as `by_layer` yields it.
    - shape: (in, out) of the kernel.
    """
    method = node.method
    if isinstance(method, AbstractFactored):
        a, b = method.factors(node, shape)
        return np.asarray(a, np.float32), np.asarray(b, np.float32)
    if isinstance(method, Sum):
        parts = [factors for child, _ in method.children(node) if (factors := exact(child, shape)) is not None]
        return _joined(parts) if len(parts) == len(method.parts) else None
    if isinstance(method, Scaled):
        ((child, _),) = method.children(node)
        factor = float(node.frozen["factor"])
        return _scaled(child, factor, 1.0 - factor - float(node.frozen.get("rest", 0.0)), shape)
    return None


def _scaled(child: Adapter, factor: float, missing: float, shape: tuple[int, int]) -> Factors | None:
    """Factors of a scaled adapter.

    missing: the share of what `init` took out of the base that neither the base nor the scaled change holds.
    """
    factors = exact(child, shape)
    if factors is None:
        return None
    scaled = (np.float32(factor) * factors[0], factors[1])
    if not child.method.rewrites_base or missing == 0.0:
        return scaled
    offset = exact(dataclasses.replace(child, train=jax.tree.map(jnp.zeros_like, child.train)), shape)
    assert offset is not None
    alive = offset[0].any(axis=0) & offset[1].any(axis=1)
    return _joined([scaled, (np.float32(missing) * offset[0][:, alive], offset[1][alive])])


def _joined(parts: list[Factors]) -> Factors:
    """Factors of a sum."""
    return np.concatenate([a for a, _ in parts], axis=1), np.concatenate([b for _, b in parts], axis=0)


def truncated(change: Float[np.ndarray, "in out"], rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """`(a, b, error)`, the best factors of a given rank for a change of the base.

    a = U_r sqrt(S_r), b = sqrt(S_r) V_r^T; error = ||change - a b|| / ||change|| (Frobenius), 0 if nothing changed.
    """
    u, s, vt = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    norm = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[rank:])) / norm if norm else 0.0
    return (u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32), error
