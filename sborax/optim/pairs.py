"""Sibling leaves a (in, rank) and b (rank, out) in any tree: what optimisers that need both at once work on."""

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
    """Every pair by the path of its parent. Leaves `a` and `b` are one if their rank and stack axes agree."""
    found: dict[str, dict[str, Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        head, last = _parent(path)
        if last in ("a", "b"):
            found.setdefault(head, {})[last] = leaf
    return {head: (both["a"], both["b"]) for head, both in found.items() if len(both) == 2 and agree(**both)}


def agree(a: Array, b: Array) -> bool:
    """Whether the rank and the stack axes of both are the same."""
    return a.ndim == b.ndim >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]


def sides(tree: PyTree) -> PyTree:
    """For every leaf "a" or "b" if it is that half of a pair, else "rest"."""
    known = pairs(tree)

    def one(path: tuple, _: Any) -> str:
        head, last = _parent(path)
        return last if head in known and last in ("a", "b") else "rest"

    return jax.tree_util.tree_map_with_path(one, tree)


def replace_pairs(tree: PyTree, new: Mapping[str, Pair]) -> PyTree:
    """`tree` with other pairs at the paths in `new`."""

    def one(path: tuple, leaf: Array) -> Array:
        head, last = _parent(path)
        return new[head]["ab".index(last)] if head in new and last in ("a", "b") else leaf

    return jax.tree_util.tree_map_with_path(one, tree)


def over_pairs(function: Callable[..., Any], stack: int) -> Callable[..., Any]:
    """`function` of one layer, mapped over `stack` leading axes."""
    for _ in range(stack):
        function = jax.vmap(function)
    return function
