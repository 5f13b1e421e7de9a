"""Merges several adapters into one base, each with a weight, and goes back to the base."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.core import AbstractAdditive, AbstractWeight, Adapter, SboraxError
from sborax.adapters.leaves import flatten, replace_leaves
from sborax.adapters.paths import bias_path
from sborax.adapters.tree import Adapters, Params, check_base, link, merge, merge_bias, merged_node, nodes


@dataclasses.dataclass(frozen=True)
class Weighted:
    """One term of `merge_weighted`: what a training made of a base, times `weight`.

    - weight: the factor of the change.
    - adapters: a tree of adapters.
    - params: the parameters that go with the adapters, as `attach` or training left them. Default None: the base.
    - base: the base that they were trained on. Default None: the base that they are merged into. Give it if it differs
      from that, because it was quantised, say.
    """

    weight: float
    adapters: Adapters
    params: Params | None = None
    base: Params | None = None


def merge_weighted(params: Params, parts: Sequence[Weighted]) -> Params:
    """W + sum_i weight_i (W_i - W), where W_i is what `merge` makes of part i alone.

    W are kernels, and base leaves that were trained beside adapters. Computed in float32, then rounded once to the
    dtype of W. Entries that no part changes keep their bits.

    For additive methods W_i - W is the adapter's delta. PEFT calls this combination "cat", or "svd" with full rank; its
    "linear" weighs the factors instead, which is another function. For other methods, such as DoRA, W_i - W is the
    change that the whole adapter makes.

    Args:
    - params: the parameters W of the base.
    - parts: adapters, each with its weight and, if they are not W, the parameters that go with it.

    Raises SboraxError for a tree of another model, for a method without a merged form, and for a part whose method
    rewrites the base and whose `params` are not what it left.
    """
    if not parts:
        raise SboraxError("there is nothing to merge: give one or more adapters")
    leaves = flatten(params)
    sums: dict[str, Float[Array, "..."]] = {}
    for part in parts:
        trained = flatten(params if part.params is None else part.params)
        base = flatten(params if part.base is None else part.base)
        adapters = nodes(link(part.adapters))
        for tree in (trained, base):
            _check_same_model(leaves, tree)
        for path, node in adapters.items():
            if node.method.no_merge:
                raise SboraxError(f"{path}: {type(node.method).__name__} cannot be merged: {node.method.no_merge}")
            if path not in leaves:
                raise SboraxError(f"{path}: there is an adapter but no kernel at this path")
            check_base(path, trained[path], node)
        for path in trained:
            change = _change(path, trained, base, adapters)
            if change is not None:
                change = jnp.float32(part.weight) * change
                sums[path] = sums[path] + change if path in sums else change
    return replace_leaves(params, {path: _moved(leaves[path], total) for path, total in sums.items()})


def unmerge(merged: Params, adapters: Adapters, params: Params) -> Params:
    """`params`, if merging `adapters` into them gives `merged`, bit for bit.

    A merged weight alone does not determine its base, because adding the delta rounds. So an exact way back needs the
    base. `merge(merged, scale(adapters, -1.0))` needs none. It is off by the rounding of the sum, exact where the
    adapter changes nothing, and only for additive methods that do not rewrite the base.

    Args:
    - merged: merged parameters.
    - adapters: the tree of adapters that was merged.
    - params: the parameters that it was merged into.

    Raises SboraxError where `merged` differs, with the largest difference.
    """
    expected, given = flatten(merge(params, adapters)), flatten(merged)
    _check_same_model(expected, given)
    for path, leaf in expected.items():
        ours, theirs = np.asarray(_array(leaf)), np.asarray(_array(given[path]))
        if ours.dtype != theirs.dtype or ours.tobytes() != theirs.tobytes():
            apart = np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max()
            raise SboraxError(
                f"{path}: the merged weight is not that of this base and these adapters ({ours.dtype} and "
                f"{theirs.dtype}, {apart:.3g} apart at most); it was merged from others, or changed since"
            )
    return params


def _check_same_model(leaves: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    for path in sorted(leaves.keys() | others.keys()):
        if path not in leaves or path not in others:
            raise SboraxError(f"{path}: in one of the two models only; adapters of another model do not fit this one")
        if tuple(leaves[path].shape) != tuple(others[path].shape):
            shapes = f"{tuple(leaves[path].shape)} and {tuple(others[path].shape)}"
            raise SboraxError(f"{path}: {shapes}; adapters of another model do not fit this one")


def _array(leaf: Any) -> Float[Array, "..."]:
    """A leaf as a plain array. Unlike `dense`, it takes leaves of any shape, such as the scale of a norm."""
    return leaf.dense() if isinstance(leaf, AbstractWeight) else leaf


def _wide(leaf: Any) -> Float[Array, "..."]:
    return _array(leaf).astype(jnp.float32)


def _change(
    path: str, trained: Mapping[str, Any], base: Mapping[str, Any], adapters: Mapping[str, Adapter]
) -> Float[Array, "..."] | None:
    """The float32 change that one part makes to the base leaf at `path`; None for no change.

    - trained: by path, the parameters that go with the adapters.
    - base: by path, the parameters before training.
    - adapters: by path.
    """
    leaf = trained[path]
    moved = None if leaf is base[path] else _wide(leaf) - _wide(base[path])
    added = _added(path, trained, adapters)
    return added if moved is None else moved if added is None else moved + added


def _added(path: str, trained: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> Float[Array, "..."] | None:
    """What the adapters add to the leaf at `path`; None for nothing."""
    if path in adapters:
        node = adapters[path]
        # A delta that does not depend on W is not rounded to the digits of W.
        start = jnp.zeros(trained[path].shape) if isinstance(node.method, AbstractAdditive) else _wide(trained[path])
        return merged_node(start, node) - start
    kernel = next((kernel for kernel in adapters if bias_path(kernel) == path), None)
    if kernel is None or not adapters[kernel].method.adapts_bias:
        return None
    start = _wide(trained[path])
    return merge_bias(path, start, trained[kernel], adapters[kernel]) - start


def _moved(leaf: Any, change: Float[Array, "..."]) -> Array:
    """A leaf plus a float32 change, in the leaf's dtype. Quantised leaves come back dense."""
    old = _array(leaf)
    # Adding zero would turn a negative zero into a positive one.
    return jnp.where(change == 0, old, (old.astype(jnp.float32) + change).astype(old.dtype))
