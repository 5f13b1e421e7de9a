"""Several adapters merged into one base, each with a weight, and the way back to the base."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.core import AbstractAdditive, AbstractWeight, Adapter, SboraxError
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.paths import bias_path
from sborax.adapters.tree import Adapters, Params, check_base, link, merge, merge_bias, merged_node, nodes


@dataclasses.dataclass(frozen=True)
class Weighted:
    """What one training made of a base, times `weight`.

    params: what the adapters stand on: the base, or what `attach` or training left of it; None: the base itself.
    base: the base it was trained on; None: the one it is merged into. Another one where that was quantised.
    """

    weight: float
    adapters: Adapters
    params: Params | None = None
    base: Params | None = None


def merge_weighted(params: Params, parts: Sequence[Weighted]) -> Params:
    """W + sum_i weight_i (W_i - W), where W_i is what `merge` makes of part i alone: kernels, and base leaves trained
    beside adapters. Computed in float32 and rounded once to the dtype of W.

    For additive methods W_i - W is the adapter's delta, whatever the weight: with PEFT's words, combination "cat", and
    "svd" of full rank. ("linear" weighs the factors instead, which is something else.) For the others, DoRA say,
    it is the change that the whole adapter made. Entries that no part changes keep their bits.

    Raises SboraxError for a tree of another model, for a method without a merged form, and for a part whose method
    rewrites the base and whose `params` are not what it left.
    """
    if not parts:
        raise SboraxError("there is nothing to merge: give one or more adapters")
    flat = flatten(params)
    sums: dict[str, Float[Array, "..."]] = {}
    for part in parts:
        own, base = (params if tree is None else tree for tree in (part.params, part.base))
        own, base, found = flatten(own), flatten(base), nodes(link(part.adapters))
        for tree in (own, base):
            _check_same_model(flat, tree)
        for path, node in found.items():
            if node.method.no_merge:
                raise SboraxError(f"{path}: {type(node.method).__name__} cannot be merged: {node.method.no_merge}")
            if path not in flat:
                raise SboraxError(f"{path}: there is an adapter but no kernel at this path")
            check_base(path, own[path], node)
        for path in own:
            change = _change(path, own, base, found)
            if change is not None:
                change = jnp.float32(part.weight) * change
                sums[path] = sums[path] + change if path in sums else change
    return nest({path: leaf if path not in sums else _moved(leaf, sums[path]) for path, leaf in flat.items()})


def unmerge(merged: Params, adapters: Adapters, params: Params) -> Params:
    """`params`, if `merged` is what merging `adapters` into them gives, bit for bit.

    Adding the delta rounds, so several bases have the same merged weight, and none can be told from that weight alone:
    the way back that is exact begins at the base. (`merge(merged, scale(adapters, -1.0))` needs no base; it is off by
    the rounding of the sum, and right where the adapter changes nothing. For methods that leave the base as it is.)

    Raises SboraxError where they differ, with the largest difference.
    """
    again, given = flatten(merge(params, adapters)), flatten(merged)
    _check_same_model(again, given)
    for path, leaf in again.items():
        one, other = np.asarray(_array(leaf)), np.asarray(_array(given[path]))
        if one.dtype != other.dtype or one.tobytes() != other.tobytes():
            apart = np.abs(one.astype(np.float32) - other.astype(np.float32)).max()
            raise SboraxError(
                f"{path}: the merged weight is not that of this base and these adapters ({one.dtype} and "
                f"{other.dtype}, {apart:.3g} apart at most); it was merged from others, or changed since"
            )
    return params


def _check_same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    for path in sorted(one.keys() | other.keys()):
        if path not in one or path not in other:
            raise SboraxError(f"{path}: in one of the two models only; adapters of another model do not fit this one")
        if tuple(one[path].shape) != tuple(other[path].shape):
            shapes = f"{tuple(one[path].shape)} and {tuple(other[path].shape)}"
            raise SboraxError(f"{path}: {shapes}; adapters of another model do not fit this one")


def _array(leaf: Any) -> Float[Array, "..."]:
    return leaf.dense() if isinstance(leaf, AbstractWeight) else leaf


def _wide(leaf: Any) -> Float[Array, "..."]:
    return _array(leaf).astype(jnp.float32)


def _change(
    path: str, own: Mapping[str, Any], base: Mapping[str, Any], found: Mapping[str, Adapter]
) -> Float[Array, "..."] | None:
    """What one part makes of the base leaf at `path`, less that leaf, in float32; None for nothing.

    own: what its adapters, `found`, stand on. base: what it was trained on. All by path.
    """
    leaf = own[path]
    moved = None if leaf is base[path] else _wide(leaf) - _wide(base[path])
    added = _added(path, own, found)
    return added if moved is None else moved if added is None else moved + added


def _added(path: str, own: Mapping[str, Any], found: Mapping[str, Adapter]) -> Float[Array, "..."] | None:
    """What the adapters add to the leaf at `path` that they stand on; None for nothing."""
    if path in found:
        node = found[path]
        # A delta that never looks at W is not rounded to its digits.
        start = jnp.zeros(own[path].shape) if isinstance(node.method, AbstractAdditive) else _wide(own[path])
        return merged_node(start, node) - start
    kernel = next((kernel for kernel in found if bias_path(kernel) == path), None)
    if kernel is None or not found[kernel].method.adapts_bias:
        return None
    start = _wide(own[path])
    return merge_bias(path, start, own[kernel], found[kernel]) - start


def _moved(leaf: Any, change: Float[Array, "..."]) -> Array:
    """A leaf moved by a float32 change. Quantised ones come back dense."""
    own = _array(leaf)
    # Adding zero would turn a negative zero.
    return jnp.where(change == 0, own, (own.astype(jnp.float32) + change).astype(own.dtype))
