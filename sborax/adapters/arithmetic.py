"""Sums and multiples: of methods, and of adapters that were trained apart."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sborax.adapters.compose import ByLayer, Scaled, Sum, with_parts
from sborax.adapters.core import AbstractAdditive, AbstractMethod, Adapter, SboraxError, structure

Layers = tuple[int, ...]


def _additive(method: AbstractMethod, verb: str) -> AbstractAdditive:
    if not isinstance(method, AbstractAdditive):
        raise SboraxError(f"{verb} needs additive methods; {type(method).__name__} rewrites the weight as a whole")
    return method


def add_methods(*methods: AbstractMethod) -> Sum:
    """One method that keeps every given one on the same kernel. Raises SboraxError unless all are additive."""
    return Sum(tuple(_additive(method, "add") for method in methods))


def scale_method(method: AbstractMethod, factor: float) -> Scaled:
    """One method whose delta is `factor` times that of `method`. Raises SboraxError unless it is additive."""
    return Scaled(_additive(method, "scale"), factor)


def add_adapters(nodes: Sequence[Adapter], stack: tuple[int, ...]) -> Adapter:
    """One adapter whose delta is the sum of those of `nodes`, layer by layer where some act on a part of the stack.

    Raises SboraxError for a method that is not additive, for several that rewrite the base, each of which stands on
    another one, and for layers that are linked and would come apart.
    """
    rewriting = [type(node.method).__name__ for node in nodes if node.method.rewrites_base]
    if len(rewriting) > 1:
        raise SboraxError(
            f"add: {rewriting[0]} and {rewriting[1]} each took a part out of the base, and no base lacks both; "
            "merge_weighted sums what they changed"
        )
    if not any(isinstance(node.method, ByLayer) for node in nodes):
        return side_by_side(nodes)
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    acting = [by_layer(node) for node in nodes]
    for layer in range(math.prod(stack)):
        here = ((i, j) for i, own in enumerate(acting) for j, (_, layers) in enumerate(own) if _acts(layer, layers))
        groups.setdefault(tuple(here), []).append(layer)
    linked = next((node.method for node in nodes if node.method.linked), None)
    if linked is not None:
        raise SboraxError(f"add: {type(linked).__name__} links layers, which a sum on some of them would part")
    parts = [[acting[i][j][0] for i, j in here] for here in groups if here]
    layers = [tuple(own) for here, own in groups.items() if here]
    return joined([own[0] if len(own) == 1 else side_by_side(own) for own in parts], layers, stack)


def _acts(layer: int, layers: Layers | None) -> bool:
    return layers is None or layer in layers


def side_by_side(nodes: Sequence[Adapter]) -> Adapter:
    """One adapter that has all `nodes`, on every layer."""
    return Adapter(
        train={str(i): node.train for i, node in enumerate(nodes)},
        frozen={str(i): node.frozen for i, node in enumerate(nodes)},
        method=Sum(tuple(_additive(node.method, "add") for node in nodes)),
        in_axes=nodes[0].in_axes,
    )


def scale_adapter(node: Adapter, factor: float | Array, stack: tuple[int, ...]) -> Adapter:
    """One adapter whose delta is `factor` times that of `node`. Raises SboraxError unless its methods are additive."""
    if isinstance(node.method, ByLayer):
        return with_parts(node, [scale_adapter(child, factor, stack) for child, _ in by_layer(node)])
    # The factor is a leaf and no part of the structure, so that it may be traced.
    scaled = Scaled(_additive(node.method, "scale"), 1.0)
    frozen = {"part": node.frozen, **scaled.multipliers(factor, stack)}
    return Adapter({"part": node.train}, frozen, structure(scaled), node.in_axes)


def by_layer(node: Adapter) -> list[tuple[Adapter, Layers | None]]:
    """The adapters that share a stack, each with its layers; a node that acts on all (None) is its only one."""
    return node.method.children(node) if isinstance(node.method, ByLayer) else [(node, None)]


def joined(parts: Sequence[Adapter], layers: Sequence[Layers], stack: tuple[int, ...]) -> Adapter:
    """One adapter: `parts[i]`, whose leaves have the whole stack, on the layers `layers[i]`, and nothing on others."""
    branch = np.zeros(math.prod(stack), np.int32)
    for i, own in enumerate(layers):
        branch[list(own)] = i + 1
    return Adapter(
        train={str(i): part.train for i, part in enumerate(parts)},
        frozen={"branch": jnp.asarray(branch.reshape(stack)), **{str(i): part.frozen for i, part in enumerate(parts)}},
        method=ByLayer(tuple(part.method for part in parts), tuple(layers)),
        in_axes=parts[0].in_axes,
    )
