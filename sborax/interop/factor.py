"""Adapters of single layers, and their change of the base as thin factors: exact where it has some, else truncated."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sborax.adapters.compose import Scaled, Sum, with_fields, with_parts
from sborax.adapters.core import AbstractComposite, AbstractFactored, Adapter, leaf_axes

Pair = tuple[np.ndarray, np.ndarray]


def by_layer(node: Adapter, depth: int | None) -> Iterator[tuple[int | None, Adapter]]:
    """The adapter of every layer of a stack of `depth` (None: not stacked) that has one, without stack axis or padding.

    Methods that share a stack come apart: each layer is yielded with its own.
    """
    if isinstance(node.method, AbstractComposite):
        children = node.method.children(node)
        if all(layers is not None for _, layers in children):
            for child, layers in children:
                yield from ((i, one) for i, one in by_layer(child, depth) if i in (layers or ()))
            return
    for layer in [None] if depth is None else range(depth):
        yield layer, _trimmed(jax.tree.map(lambda leaf, i=layer: leaf if i is None else leaf[i], node), layer)


def _trimmed(node: Adapter, layer: int | None) -> Adapter:
    """One layer's adapter without the columns that only pad it to the stack's largest rank."""
    method = node.method
    if isinstance(method, Sum | Scaled):
        return with_parts(node, [_trimmed(child, layer) for child, _ in method.children(node)])
    if layer is None or not isinstance(method.rank, tuple):
        return node
    own = method.rank[layer]

    def cut(leaves):
        axes = leaf_axes(method.axes, leaves)
        return {
            name: leaf[tuple(slice(own) if axis == "rank" else slice(None) for axis in axes[name])]
            for name, leaf in leaves.items()
        }

    return Adapter(cut(node.train), cut(node.frozen), with_fields(method, rank=own), node.in_axes)


def exact(node: Adapter, shape: tuple[int, int]) -> Pair | None:
    """`(a, b)` with `a @ b` what one layer's adapter changes in the original base; None if it has no thin factors."""
    method = node.method
    if isinstance(method, AbstractFactored):
        a, b = method.factors(node, shape)
        return np.asarray(a, np.float32), np.asarray(b, np.float32)
    if isinstance(method, Sum):
        pairs = [pair for child, _ in method.children(node) if (pair := exact(child, shape)) is not None]
        return _joined(pairs) if len(pairs) == len(method.parts) else None
    if isinstance(method, Scaled):
        ((child, _),) = method.children(node)
        factor = float(node.frozen["factor"])
        return _scaled(child, factor, 1.0 - factor - float(node.frozen.get("rest", 0.0)), shape)
    return None


def _scaled(child: Adapter, factor: float, missing: float, shape: tuple[int, int]) -> Pair | None:
    """missing: how much of what the base gave up is in neither the base nor the scaled change."""
    pair = exact(child, shape)
    if pair is None:
        return None
    scaled = (np.float32(factor) * pair[0], pair[1])
    if not child.method.rewrites_base or missing == 0.0:
        return scaled
    offset = exact(dataclasses.replace(child, train=jax.tree.map(jnp.zeros_like, child.train)), shape)
    assert offset is not None
    alive = offset[0].any(axis=0) & offset[1].any(axis=1)
    return _joined([scaled, (np.float32(missing) * offset[0][:, alive], offset[1][alive])])


def _joined(pairs: list[Pair]) -> Pair:
    return np.concatenate([a for a, _ in pairs], axis=1), np.concatenate([b for _, b in pairs], axis=0)


def truncated(change: Float[np.ndarray, "in out"], rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best `(a, b)` of that rank for a change of the base, and the relative Frobenius error.

    a = U_r sqrt(S_r), b = sqrt(S_r) V_r^T; error = ||change - a b|| / ||change||, 0 for no change at all.
    """
    u, s, vt = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    whole = float(np.linalg.norm(s))
    error = float(np.linalg.norm(s[rank:])) / whole if whole else 0.0
    return (u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32), error
