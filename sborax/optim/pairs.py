"""Pairs of sibling leaves a (in, rank) and b (rank, out) in any tree, for optimisers that need both at once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, PyTree

Pair = tuple[Array, Array]
"""(a, b), stack axes in front."""


def _parent(path: tuple) -> tuple[str, str]:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    head, _, last = name.rpartition("/")
    return head, last


def pairs(tree: PyTree) -> dict[str, Pair]:
    """Every pair by the path of its parent. Leaves `a` and `b` are a pair if their ranks and stack axes agree."""
    factors: dict[str, dict[str, Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        head, last = _parent(path)
        if last in ("a", "b"):
            factors.setdefault(head, {})[last] = leaf
    return {head: (both["a"], both["b"]) for head, both in factors.items() if len(both) == 2 and agree(**both)}


def agree(a: Array, b: Array) -> bool:
    """Whether both have the same rank and the same stack axes."""
    return a.ndim == b.ndim >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]


def sides(tree: PyTree) -> PyTree:
    """For every leaf: "a" or "b" if it is that half of a pair, else "rest"."""
    factors = pairs(tree)

    def side(path: tuple, _: Any) -> str:
        head, last = _parent(path)
        return last if head in factors and last in ("a", "b") else "rest"

    return jax.tree_util.tree_map_with_path(side, tree)


def replace_pairs(tree: PyTree, new: Mapping[str, Pair]) -> PyTree:
    """`tree` with the pairs of `new` at their paths."""

    def new_leaf(path: tuple, leaf: Array) -> Array:
        head, last = _parent(path)
        return new[head]["ab".index(last)] if head in new and last in ("a", "b") else leaf

    return jax.tree_util.tree_map_with_path(new_leaf, tree)


def over_pairs(function: Callable[..., Any], stack: int) -> Callable[..., Any]:
    """`function`, which is of one layer, mapped over `stack` leading axes."""
    for _ in range(stack):
        function = jax.vmap(function)
    return function
