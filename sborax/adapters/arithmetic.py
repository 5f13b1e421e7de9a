"""Sums and multiples of methods, and of adapters that were trained separately."""

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
    """A method whose delta is the sum of the deltas. Raises SboraxError for a method that is not additive."""
    return Sum(tuple(_additive(method, "add") for method in methods))


def scale_method(method: AbstractMethod, factor: float) -> Scaled:
    """A method whose delta is `factor` times that of `method`. Raises SboraxError unless it is additive."""
    return Scaled(_additive(method, "scale"), factor)


def add_adapters(nodes: Sequence[Adapter], stack: tuple[int, ...]) -> Adapter:
    """One adapter whose delta is the sum of those of `nodes`, which share a kernel with the given stack axes.

    If some act on a part of the stack only, layers are grouped by the adapters that act on them.

    Raises SboraxError for a method that is not additive, for two methods that rewrite the base, since each belongs to
    another base, and for linked layers that would be separated.
    """
    rewriting = [type(node.method).__name__ for node in nodes if node.method.rewrites_base]
    if len(rewriting) > 1:
        raise SboraxError(
            f"add: {rewriting[0]} and {rewriting[1]} each took a part out of the base, and no base lacks both; "
            "merge_weighted sums what they changed"
        )
    if not any(isinstance(node.method, ByLayer) for node in nodes):
        return side_by_side(nodes)
    groups: dict[tuple[int, ...], list[int]] = {}
    parts = [part for node in nodes for part in by_layer(node)]
    for layer in range(math.prod(stack)):
        acting = (i for i, (_, layers) in enumerate(parts) if layers is None or layer in layers)
        groups.setdefault(tuple(acting), []).append(layer)
    linked = next((node.method for node in nodes if node.method.linked), None)
    if linked is not None:
        raise SboraxError(f"add: {type(linked).__name__} links layers, which a sum on some of them would part")
    terms = {acting: [parts[i][0] for i in acting] for acting in groups if acting}
    sums = [adapters[0] if len(adapters) == 1 else side_by_side(adapters) for adapters in terms.values()]
    return joined(sums, [tuple(groups[acting]) for acting in terms], stack)


def side_by_side(nodes: Sequence[Adapter]) -> Adapter:
    """One adapter whose delta is the sum of those of `nodes`, on every layer."""
    return Adapter(
        train={str(i): node.train for i, node in enumerate(nodes)},
        frozen={str(i): node.frozen for i, node in enumerate(nodes)},
        method=Sum(tuple(_additive(node.method, "add") for node in nodes)),
        in_axes=nodes[0].in_axes,
    )


def scale_adapter(node: Adapter, factor: float | Array, stack: tuple[int, ...]) -> Adapter:
    """An adapter whose delta is `factor` times that of `node`. Raises SboraxError unless its methods are additive."""
    if isinstance(node.method, ByLayer):
        return with_parts(node, [scale_adapter(child, factor, stack) for child, _ in by_layer(node)])
    # The factor becomes a leaf, so it may be traced; the 1.0 is stripped from the structure.
    scaled = Scaled(_additive(node.method, "scale"), 1.0)
    frozen = {"part": node.frozen, **scaled.multipliers(factor, stack)}
    return Adapter({"part": node.train}, frozen, structure(scaled), node.in_axes)


def by_layer(node: Adapter) -> list[tuple[Adapter, Layers | None]]:
    """The adapters of a node that acts by layer, each with its layers; else the node itself, with None for all."""
    return node.method.children(node) if isinstance(node.method, ByLayer) else [(node, None)]


def joined(parts: Sequence[Adapter], layers: Sequence[Layers], stack: tuple[int, ...]) -> Adapter:
    """One adapter that is `parts[i]` on the layers `layers[i]` and the base on all others.

    - parts: adapters whose leaves have the stack axes `stack`.
    """
    branch = np.zeros(math.prod(stack), np.int32)
    for i, positions in enumerate(layers):
        branch[list(positions)] = i + 1
    return Adapter(
        train={str(i): part.train for i, part in enumerate(parts)},
        frozen={"branch": jnp.asarray(branch.reshape(stack)), **{str(i): part.frozen for i, part in enumerate(parts)}},
        method=ByLayer(tuple(part.method for part in parts), tuple(layers)),
        in_axes=parts[0].in_axes,
    )
