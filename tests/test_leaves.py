"""Trees and their leaves by path."""

import chex
import jax.numpy as jnp
import pytest

from sborax.adapters.leaves import flatten, map_with_path, nest, replace_leaves
from sborax.models.nf4 import NF4Array, quantise

pytestmark = pytest.mark.quick

TREE = {"layers": {"0": {"kernel": jnp.zeros(2), "bias": jnp.ones(1)}}, "norm": {"scale": jnp.full(3, 2.0)}}
PATHS = ["layers/0/bias", "layers/0/kernel", "norm/scale"]


def test_leaves_are_found_by_path_in_tree_order_and_nested_again():
    assert list(flatten(TREE)) == PATHS
    chex.assert_trees_all_equal(nest(flatten(TREE)), TREE)
    assert flatten({}) == {} and nest({}) == {}


def test_a_quantised_weight_is_one_leaf():
    tree = {"kernel": quantise(jnp.ones((64, 8)))}
    assert isinstance(flatten(tree)["kernel"], NF4Array)
    assert all(path.startswith("kernel/") for path in flatten(tree, is_leaf=None))
    assert map_with_path(lambda path, leaf: (path, type(leaf)), tree) == {"kernel": ("kernel", NF4Array)}


def test_a_function_gets_the_path_and_the_leaves_of_every_tree():
    numbers = {"layers": {"0": {"kernel": 1, "bias": 2}}, "norm": {"scale": 3}}
    named = map_with_path(lambda path, leaf, number: (path, leaf.size, number), TREE, numbers)
    assert named["layers"]["0"] == {"kernel": ("layers/0/kernel", 2, 1), "bias": ("layers/0/bias", 1, 2)}
    assert named["norm"] == {"scale": ("norm/scale", 3, 3)}


def test_leaves_are_replaced_by_path_and_others_stay_the_same_arrays():
    changed = replace_leaves(TREE, {"norm/scale": jnp.zeros(3)})
    assert changed["layers"]["0"]["kernel"] is TREE["layers"]["0"]["kernel"]
    chex.assert_trees_all_equal(changed["norm"]["scale"], jnp.zeros(3))
    assert replace_leaves(TREE, {}) is TREE
