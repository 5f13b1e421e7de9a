"""The contract between every method and the base it stands on, wherever the two meet after `attach`."""

import chex
import jax
import numpy as np
import pytest
from bare_kernels import assert_close, base, by_few, forward, hints, host, inputs, merged, standalone, trained
from cases import FEW, LAYERS, METHODS, Case
from nightly import nightly_unless

import sborax as sx
from sborax.adapters.core import is_weight
from sborax.adapters.tree import nodes
from sborax.models.nf4 import NF4Array
from sborax.records.adapter import fingerprint, load_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("strict")

by_merged_case = pytest.mark.parametrize(
    "case", nightly_unless(FEW, [case for case in METHODS if not case.method.no_merge]), ids=lambda case: case.name
)


def tree(quantised: bool):
    return {"layers": {"proj": {"kernel": base("float32", True, quantised)}}}


def only(params):
    (weight,) = jax.tree.leaves(params, is_leaf=is_weight)
    return weight


def saved(case: Case, directory, quantised: bool, rule=None):
    start = tree(quantised)
    params, adapters = sx.attach(jax.random.key(0), start, [rule or ("proj", case.method)], hints(case.method, True))
    adapters = {"layers": {"proj": {"kernel": trained(standalone(adapters))}}}
    save_adapter(directory, adapters, base=fingerprint(start))
    return params, adapters


@pytest.mark.parametrize("quantised", [False, True], ids=["dense-to-nf4", "nf4-to-dense"])
@by_merged_case
def test_an_adapter_on_another_base_is_still_what_it_merges_to(case: Case, quantised, tmp_path):
    saved(case, tmp_path, quantised)
    params, adapters = load_adapter(tmp_path, tree(not quantised))
    (node,) = nodes(adapters).values()
    assert_close(forward(inputs(), only(params), node), host(inputs()) @ host(merged(only(params), node)), 2e-5)


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "nf4"])
@by_few
def test_on_the_same_base_every_bit_comes_back(case: Case, quantised, tmp_path):
    params, adapters = saved(case, tmp_path, quantised)
    second, copy = load_adapter(tmp_path, tree(quantised))
    chex.assert_trees_all_equal_structs(copy, adapters)
    chex.assert_trees_all_equal(copy, adapters)
    chex.assert_trees_all_equal(second, params)


@by_few
def test_unselected_layers_keep_their_codes(case: Case):
    start = tree(True)
    rule = sx.Rule("proj", case.method, layers=(0, -1))
    params, adapters = sx.attach(jax.random.key(0), start, [rule], hints(case.method, True))
    node, weight = trained(standalone(adapters)), only(params)
    assert isinstance(weight, NF4Array)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda leaf: leaf[1], kernel) for kernel in (weight, only(start))))
    y = forward(inputs(), weight, node)
    chex.assert_trees_all_equal(y[1], forward(inputs(), only(start), node)[1])
    assert LAYERS == 3 and not np.array_equal(y[0], y[1])


@pytest.mark.parametrize("case", [case for case in METHODS if case.method.rewrites_base], ids=lambda case: case.name)
def test_leaves_tell_the_rewritten_base_from_the_one_before(case: Case):
    params, adapters = sx.attach(jax.random.key(0), tree(False), [("proj", case.method)], hints(case.method, True))
    sx.merge(params, adapters)
    if case.method.of_quantised:
        # A dense base loses nothing, so nothing was taken from it.
        chex.assert_trees_all_equal(params, tree(False))
        return
    with pytest.raises(sx.SboraxError, match="took its start out of the base"):
        sx.merge(tree(False), adapters)
