"""Merges several adapters into one base, each with a weight, and goes back to the base."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sborax.adapters.arithmetic import by_layer
from sborax.adapters.combination import Combination, leading_factors
from sborax.adapters.core import (
    AbstractAdditive,
    AbstractFactored,
    AbstractWeight,
    Adapter,
    SboraxError,
    pair_of,
    width,
)
from sborax.adapters.depth import over_stack, stack_of
from sborax.adapters.leaves import flatten, replace_leaves
from sborax.adapters.paths import bias_path, weight_keys
from sborax.adapters.rebase import as_matrix
from sborax.adapters.tree import Adapters, Params, check_base, link, merge, merge_bias, merged_node, nodes, tree_of


@dataclasses.dataclass(frozen=True)
class Weighted:
    """One term of `merge_weighted`: the change of a base by training, times `weight`.

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


class ThinChange(NamedTuple):
    """A change a b of one kernel, or of a stack of them.

    - a, b: factors, the scale included.
    - node: an adapter of this kernel, which says what its axes are.
    """

    a: Float[Array, "*stack in rank"]
    b: Float[Array, "*stack rank out"]
    node: Adapter


def merge_weighted(
    params: Params,
    parts: Sequence[Weighted],
    combination: Combination = Combination(),
    key: Key[Array, ""] | None = None,
) -> Params:
    """W plus a combination of the changes W_i - W, where W_i is what `merge` makes of part i alone.

    By default that is W + sum_i weight_i (W_i - W). `Combination` has the others: TIES, DARE, pruning by magnitude and
    sums of factors. W are kernels and, for the default alone, base leaves that were trained beside adapters. Computed
    in float32, then rounded once to the dtype of W. Entries that no part changes keep their bits.

    For additive methods W_i - W is the adapter's delta. For other methods, such as DoRA, it is the change that the
    whole adapter makes.

        parts = [sx.Weighted(0.5, one), sx.Weighted(0.5, two)]
        sx.merge_weighted(params, parts, sx.Combination("ties_svd", density=0.2))

    Args:
    - params: the parameters W of the base.
    - parts: adapters, each with its weight and, if they are not W, the parameters that go with it.
    - combination: how changes are combined. Default: their weighted sum.
    - key: for a combination that drops entries at random.

    Raises SboraxError for a tree of another model, for a method without a merged form, for a part whose method rewrites
    the base and whose `params` are not what it left, and for parts that the combination does not take.
    """
    leaves, terms = flatten(params), _terms(params, parts)
    if combination.kind == "cat":
        sums: dict[str, Float[Array, "..."]] = {}
        for term in terms:
            for path in term.trained:
                change = _change(path, term.trained, term.base, term.adapters)
                if change is not None:
                    change = jnp.float32(term.weight) * change
                    sums[path] = sums[path] + change if path in sums else change
    elif combination.of_changes and combination.rank is None:
        sums = {path: change for path, (change, _) in _combined_changes(terms, combination, key).items()}
    else:
        thin = _thin_changes(terms, combination, key, combination.rank)
        sums = {path: _product(change).reshape(leaves[path].shape) for path, change in thin.items()}
    return replace_leaves(params, {path: _shift(leaves[path], total) for path, total in sums.items()})


def thin_changes(
    params: Params, parts: Sequence[Weighted], combination: Combination, key: Key[Array, ""] | None = None
) -> dict[str, ThinChange]:
    """Factors of the combined change of every kernel, by its path. `weighted_lora` makes adapters of them.

    Args and errors: as `merge_weighted`. If `combination` truncates and has no rank, the largest rank of the adapters
    is used. In that case, and for "cat", all adapters must be pairs of factors, such as LoRA. The rank of "cat" is the
    sum of their ranks.
    """
    terms = _terms(params, parts)
    if not combination.of_changes:
        return _thin_changes(terms, combination, key, None)
    if combination.kind == "cat":
        return {
            path: ThinChange(
                jnp.concatenate([weight[..., None, None] * a for weight, a, _ in pairs], axis=-1),
                jnp.concatenate([b for _, _, b in pairs], axis=-2),
                node,
            )
            for path, (pairs, node) in _pairs(terms, combination).items()
        }
    rank = combination.rank or max(a.shape[-1] for pairs, _ in _pairs(terms, combination).values() for _, a, _ in pairs)
    return _thin_changes(terms, combination, key, rank)


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
    expected, merged_leaves = flatten(merge(params, adapters)), flatten(merged)
    _check_same_model(expected, merged_leaves)
    for path, leaf in expected.items():
        ours, theirs = np.asarray(_array(leaf)), np.asarray(_array(merged_leaves[path]))
        if ours.dtype != theirs.dtype or ours.tobytes() != theirs.tobytes():
            apart = np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max()
            raise SboraxError(
                f"{path}: the merged weight is not that of this base and these adapters ({ours.dtype} and "
                f"{theirs.dtype}, {apart:.3g} apart at most); it was merged from others, or changed since"
            )
    return params


class _Term(NamedTuple):
    """A part by the paths of its leaves: what training made of the base, the base, and the adapters."""

    weight: float
    trained: dict[str, Any]
    base: dict[str, Any]
    adapters: dict[str, Adapter]


def _terms(params: Params, parts: Any) -> list[_Term]:
    if not isinstance(parts, Sequence) or not all(isinstance(part, Weighted) for part in parts):
        raise SboraxError("expected a list of adapters with weights, such as [sx.Weighted(1.0, adapters)]")
    if not parts:
        raise SboraxError("there is nothing to merge: give one or more adapters")
    leaves, terms = flatten(params), []
    for part in parts:
        trained = flatten(params if part.params is None else part.params)
        base = flatten(params if part.base is None else part.base)
        tree_of(part.adapters, "merge_weighted")
        adapters = nodes(link(part.adapters))
        for tree in (trained, base):
            _check_same_model(leaves, tree)
        for path, node in adapters.items():
            if node.method.no_merge:
                raise SboraxError(f"{path}: {type(node.method).__name__} cannot be merged: {node.method.no_merge}")
            if path not in leaves:
                raise SboraxError(f"{path}: there is an adapter but no kernel at this path")
            check_base(path, trained[path], node)
        terms.append(_Term(part.weight, trained, base, adapters))
    return terms


def _kernels(terms: Sequence[_Term]) -> dict[str, Adapter]:
    """An adapter of every kernel that has one."""
    return {path: node for term in terms for path, node in term.adapters.items()}


def _keys(
    combination: Combination, key: Key[Array, ""] | None, path: str, stack: tuple[int, ...]
) -> Key[Array, "*stack"]:
    if key is None and combination.draws:
        raise SboraxError(f"{combination.kind!r} drops entries at random; give a key")
    return weight_keys(jax.random.key(0) if key is None else key, path, stack)


def _combined_changes(
    terms: Sequence[_Term], combination: Combination, key: Key[Array, ""] | None
) -> dict[str, tuple[Float[Array, "..."], Adapter]]:
    """The combined float32 change of every kernel, and an adapter of it."""
    changes: dict[str, list[tuple[float, Float[Array, "..."]]]] = {}
    for term in terms:
        for path in term.trained:
            change = _change(path, term.trained, term.base, term.adapters)
            if change is not None:
                changes.setdefault(path, []).append((term.weight, change))
    kernels = _kernels(terms)
    combined = {}
    for path, weighted in changes.items():
        if path not in kernels:
            raise SboraxError(f"{path}: was trained beside adapters; 'cat' sums it, {combination.kind!r} takes kernels")
        node = kernels[path]
        stack = stack_of(node)
        matrices = [as_matrix(change, len(stack), node.in_axes) for _, change in weighted]
        weights = jnp.asarray([weight for weight, _ in weighted], jnp.float32)
        merged = over_stack(lambda key, tensors, weights=weights: combination.combine(key, tensors, weights), stack)(
            _keys(combination, key, path, stack), jnp.stack(matrices, axis=len(stack))
        )
        combined[path] = (merged.reshape(weighted[0][1].shape), node)
    return combined


def _thin_changes(
    terms: Sequence[_Term], combination: Combination, key: Key[Array, ""] | None, rank: int | None
) -> dict[str, ThinChange]:
    """Factors of the combined changes: truncated to `rank`, or combined themselves."""
    thin = {}
    if combination.of_changes:
        assert rank is not None
        for path, (change, node) in _combined_changes(terms, combination, key).items():
            stack = stack_of(node)
            matrix = as_matrix(change, len(stack), node.in_axes)
            a, b = over_stack(lambda change: leading_factors(change, rank), stack)(matrix)
            thin[path] = ThinChange(a, b, node)
        return thin
    for path, (pairs, node) in _pairs(terms, combination).items():
        if len({a.shape[-1] for _, a, _ in pairs}) > 1:
            ranks = ", ".join(str(a.shape[-1]) for _, a, _ in pairs)
            raise SboraxError(
                f"{path}: {combination.kind!r} needs adapters of one rank, got {ranks}; use 'svd' or 'cat'"
            )
        stack = stack_of(node)
        weights, left, right = (jnp.stack(layers, axis=len(stack)) for layers in zip(*pairs, strict=True))

        def combine(
            key: Key[Array, ""], weights: Float[Array, " parts"], left: Array, right: Array
        ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
            keys, roots = jax.random.split(key), jnp.sqrt(jnp.abs(weights))
            signs = jnp.where(weights >= 0, jnp.ones_like(weights), -jnp.ones_like(weights))
            return combination.combine(keys[0], left, signs * roots), combination.combine(keys[1], right, roots)

        keys = _keys(combination, key, path, stack)
        a, b = over_stack(combine, stack)(keys, weights, left, right)
        thin[path] = ThinChange(a, b, node)
    return thin


_Pair = tuple[Float[Array, "*stack"], Float[Array, "*stack in rank"], Float[Array, "*stack rank out"]]


def _pairs(terms: Sequence[_Term], combination: Combination) -> dict[str, tuple[list[_Pair], Adapter]]:
    """For every kernel w_i s_i, a_i and b_i of its adapters, and one of these.

    Raises SboraxError for a method that is more than a pair of factors, and for leaves trained beside adapters.
    """
    pairs: dict[str, tuple[list[_Pair], Adapter]] = {}
    for term in terms:
        for path, leaf in term.trained.items():
            if leaf is not term.base[path]:
                raise SboraxError(
                    f"{path}: this part changes it beside its factors, which {combination.kind!r} cannot take"
                )
        for path, node in term.adapters.items():
            pairs.setdefault(path, ([], node))[0].append(_pair(path, node, term.weight, combination))
    return pairs


def _pair(path: str, node: Adapter, weight: float, combination: Combination) -> _Pair:
    """w s, a and b. Layers without an adapter have zeros, which no combination counts."""
    stack, acting = stack_of(node), by_layer(node)
    if len({width(child.method.rank) for child, _ in acting}) > 1:
        raise SboraxError(f"{path}: layers of different ranks, which {combination.kind!r} cannot take; use 'svd'")
    parts = []
    for child, layers in acting:
        method = child.method
        if not (isinstance(method, AbstractFactored) and method.pair) or method.rewrites_base:
            raise SboraxError(
                f"{path}: {type(method).__name__} is more than a pair of factors, which {combination.kind!r} combines; "
                "give a kind in 'svd', and for adapters its rank"
            )
        if isinstance(method.rank, tuple) and not combination.of_changes:
            raise SboraxError(f"{path}: layers of different ranks, which {combination.kind!r} cannot take; use 'svd'")
        flags = np.ones(stack, np.float32) if layers is None else np.zeros(stack, np.float32)
        flags.reshape(-1)[list(layers or ())] = 1.0
        mask = jnp.asarray(flags)[..., None, None]
        scale, a, b = pair_of(child)
        parts.append((jnp.float32(weight) * scale * jnp.asarray(flags), a * mask, b * mask))
    scales, left, right = zip(*parts, strict=True)
    return functools.reduce(jnp.add, scales), functools.reduce(jnp.add, left), functools.reduce(jnp.add, right)


def _product(change: ThinChange) -> Float[Array, "..."]:
    return jnp.matmul(change.a, change.b, precision="highest")


def _check_same_model(leaves: Mapping[str, Any], other_leaves: Mapping[str, Any]) -> None:
    for path in sorted(leaves.keys() | other_leaves.keys()):
        if path not in leaves or path not in other_leaves:
            raise SboraxError(f"{path}: in one of the two models only; adapters of another model do not fit this one")
        if tuple(leaves[path].shape) != tuple(other_leaves[path].shape):
            shapes = f"{tuple(leaves[path].shape)} and {tuple(other_leaves[path].shape)}"
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
    shift = None if leaf is base[path] else _wide(leaf) - _wide(base[path])
    added = _added(path, trained, adapters)
    return added if shift is None else shift if added is None else shift + added


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


def _shift(leaf: Any, change: Float[Array, "..."]) -> Array:
    """A leaf plus a float32 change, in the leaf's dtype. Quantised leaves come back dense."""
    old = _array(leaf)
    # Adding zero would turn a negative zero into a positive one.
    return jnp.where(change == 0, old, (old.astype(jnp.float32) + change).astype(old.dtype))
