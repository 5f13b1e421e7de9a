"""Trees and their leaves by path: `{"a": {"b": x}}` as `{"a/b": x}`, and back."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from sborax.adapters.weight import is_weight

IsLeaf = Callable[[Any], bool] | None


def path_of(keys: tuple[Any, ...]) -> str:
    """A key path of JAX's as text: `layers/mlp/up_proj/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: PyTree, is_leaf: IsLeaf = is_weight) -> dict[str, Any]:
    """Every leaf by its path, in tree order.

    - is_leaf: nodes that count as one leaf, as in `jax.tree.leaves`. Default: weights that are no plain array, such as
      quantised ones.
    """
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by path, the inverse of `flatten`: `{"a/b": x}` as `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        functools.reduce(lambda branch, part: branch.setdefault(part, {}), parents, tree)[last] = leaf
    return tree


def map_with_path(function: Callable[..., Any], tree: PyTree, *rest: PyTree, is_leaf: IsLeaf = is_weight) -> PyTree:
    """`function(path, leaf, *leaves of rest)` in place of every leaf, as `jax.tree_util.tree_map_with_path` does.

    - is_leaf: as in `flatten`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(path_of(keys), *leaves), tree, *rest, is_leaf=is_leaf
    )


def union(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of two nested dicts that have no leaf in common."""
    common = {name: union(first[name], second[name]) for name in first.keys() & second.keys()}
    return {**first, **second, **common}


def replace_leaves(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """`tree` with other leaves at some paths."""
    return map_with_path(lambda path, leaf: leaves.get(path, leaf), tree) if leaves else tree
