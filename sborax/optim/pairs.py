"""Pairs of sibling leaves a (in, rank) and b (rank, out) in any tree, for optimisers that need both at once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, PyTree

from sborax.adapters.leaves import flatten, map_with_path

Factors = tuple[Array, Array]
"""(a, b), stack axes in front."""


def _parent(path: str) -> tuple[str, str]:
    head, _, last = path.rpartition("/")
    return head, last


def pairs(tree: PyTree) -> dict[str, Factors]:
    """Every pair by the path of its parent. Leaves `a` and `b` are a pair if their ranks and stack axes agree."""
    factors: dict[str, dict[str, Array]] = {}
    for path, leaf in flatten(tree).items():
        head, last = _parent(path)
        if last in ("a", "b"):
            factors.setdefault(head, {})[last] = leaf
    return {head: (pair["a"], pair["b"]) for head, pair in factors.items() if len(pair) == 2 and agree(**pair)}


def agree(a: Array, b: Array) -> bool:
    """Whether both have the same rank and the same stack axes."""
    return a.ndim == b.ndim >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]


def sides(tree: PyTree) -> PyTree:
    """For every leaf: "a" or "b" if it is that half of a pair, else "rest"."""
    factors = pairs(tree)

    def side(path: str, _: Any) -> str:
        head, last = _parent(path)
        return last if head in factors and last in ("a", "b") else "rest"

    return map_with_path(side, tree)


def replace_pairs(tree: PyTree, new: Mapping[str, Factors]) -> PyTree:
    """`tree` with the pairs of `new` at their paths."""

    def new_leaf(path: str, leaf: Array) -> Array:
        head, last = _parent(path)
        return new[head]["ab".index(last)] if head in new and last in ("a", "b") else leaf

    return map_with_path(new_leaf, tree)


def over_pairs(function: Callable[..., Any], stack: int) -> Callable[..., Any]:
    """`function`, which is of one layer, mapped over `stack` leading axes."""
    for _ in range(stack):
        function = jax.vmap(function)
    return function
