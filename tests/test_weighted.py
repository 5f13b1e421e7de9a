"""Several adapters in one base: against PEFT, against single merges, bit for bit where nothing changes; and back."""

import copy
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_pair import build, shake, shaken, with_peft

import sborax as sx
from sborax.adapters.leaves import nest
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft
from sborax.layout.state import flatten
from sborax.models.nf4 import quantise

SHAPES = {"layers/q/kernel": (2, 16, 24), "layers/up/kernel": (2, 16, 16), "norm/scale": (16,)}


def base(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return nest(
        {
            path: jax.random.normal(key, shape).astype(dtype)
            for key, (path, shape) in zip(keys, SHAPES.items(), strict=True)
        }
    )


def tuned(params, rules, seed=0):
    """What a training might leave: the base it stands on, and moved adapters."""
    params, adapters = sx.attach(jax.random.key(seed), params, rules)
    return params, shaken(adapters, seed)


RULES = {
    "LoRA": [("q", sx.LoRA(3, alpha=6.0))],
    "SBoRA": [("q|up", sx.SBoRA(4))],
    "PiSSA": [("q", sx.PiSSA(2))],
    "DoRA": [("q|up", sx.DoRA(2))],
    "OFT": [("up", sx.OFT(block=4))],
    "by layer": [sx.Rule("q", sx.Bone(4), layers=(1,)), sx.Rule("q", sx.LoRA(2), layers=(0,))],
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_weights_mean_what_they_mean_in_peft(tmp_path):
    """PEFT's exact combinations, "cat" and "svd" of full rank, on every weight; its "linear" is another function."""
    pair, weights = build(tmp_path / "base"), [0.7, -0.4]
    theirs = with_peft(pair, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    second = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "up_proj"])
    theirs.add_adapter("second", second)
    theirs.set_adapter("second")
    shake(theirs, 2)
    theirs.save_pretrained(tmp_path / "peft")
    parts = []
    for weight, place in zip(weights, (tmp_path / "peft", tmp_path / "peft" / "second"), strict=True):
        params, adapters = load_peft(place, pair.ours)
        parts.append(sx.Weighted(weight, adapters, params))
    ours = sx.merge_weighted(pair.ours.params, parts)["layers"]

    def merged(kind, **options):
        model = copy.deepcopy(theirs)
        model.add_weighted_adapter(["default", "second"], weights, kind, combination_type=kind, **options)
        model.set_adapter(kind)
        return model.merge_and_unload().model.layers

    exact, thin = [merged("cat"), merged("svd", svd_rank=8)], merged("linear")
    for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        group, name = module.split(".")
        for layer in range(2):
            got = np.asarray(ours[group][name]["kernel"][layer])
            for layers in exact:
                want = layers[layer].get_submodule(module).weight.detach().numpy().T
                np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    other = thin[0].self_attn.q_proj.weight.detach().numpy().T
    assert np.abs(np.asarray(ours["self_attn"]["q_proj"]["kernel"][0]) - other).max() > 1e-3


@pytest.mark.usefixtures("strict")
def test_every_part_adds_its_own_change():
    """W + sum of w (W_i - W) in float64, over methods that see W, rewrite it, or move other leaves of the base."""
    params = base()
    parts, want = [], jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for number, (name, rules) in enumerate(RULES.items()):
        own, adapters = tuned(params, rules, number)
        if name == "LoRA":
            own = {**own, "norm": {"scale": own["norm"]["scale"] + 0.5}}
        weight = 0.3 * number - 0.7
        parts.append(sx.Weighted(weight, adapters, own))
        alone = sx.merge(own, adapters)
        want = jax.tree.map(
            lambda sum_, one, start, weight=weight: sum_ + weight * (np.float64(one) - np.float64(start)),
            want, alone, params,
        )  # fmt: skip
    got = sx.merge_weighted(params, parts)
    chex.assert_trees_all_close(got, jax.tree.map(np.float32, want), rtol=0, atol=2e-6)
    assert np.abs(got["norm"]["scale"] - params["norm"]["scale"]).min() > 0.3
    chex.assert_trees_all_equal(
        sx.merge_weighted(params, [sx.Weighted(0.0, parts[0].adapters, parts[0].params)]), params
    )


@pytest.mark.usefixtures("strict")
def test_sums_are_float32_and_rounded_once():
    """In bfloat16 the result is the rounded float32 one, and rows that no part moves keep their bits, -0.0 too."""
    half = base("bfloat16")
    half["layers"]["q"]["kernel"] = half["layers"]["q"]["kernel"].at[:, ::3].set(-0.0)
    wide = jax.tree.map(lambda leaf: leaf.astype("float32"), half)
    adapters = [tuned(wide, RULES["SBoRA"], seed)[1] for seed in (1, 2)]
    parts = [sx.Weighted(weight, own) for weight, own in zip((0.6, 0.7), adapters, strict=True)]
    got, exact = sx.merge_weighted(half, parts), sx.merge_weighted(wide, parts)
    chex.assert_trees_all_equal(got, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), exact))
    for path in ("q", "up"):
        moved = np.zeros((2, 16), bool)
        for own in adapters:
            np.put_along_axis(moved, np.asarray(own["layers"][path]["kernel"].frozen["idx"]), True, axis=1)
        bits = [np.asarray(tree["layers"][path]["kernel"]).view(np.uint16) for tree in (got, half)]
        assert ((bits[0] != bits[1]).any(axis=2) == moved).all() and moved.any() and not moved.all()


@pytest.mark.usefixtures("strict")
def test_a_change_of_a_quantised_base_moves_the_dense_one():
    params = {"layers": {"q": {"kernel": jax.random.normal(jax.random.key(3), (2, 64, 32))}}}
    held = {"layers": {"q": {"kernel": quantise(params["layers"]["q"]["kernel"])}}}
    _, adapters = tuned(held, [("q", sx.LoRA(2))])
    got = sx.merge_weighted(params, [sx.Weighted(2.0, adapters, held, held)])
    want = sx.merge(params, sx.scale(adapters, 2.0))
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-6)
    assert np.abs(held["layers"]["q"]["kernel"].dense() - params["layers"]["q"]["kernel"]).max() > 0.05


def test_what_cannot_be_merged_is_named():
    params = base()
    _, adapters = tuned(params, RULES["LoRA"])
    other = {"layers": params["layers"]}
    narrow = {**params, "norm": {"scale": jnp.ones(8)}}
    _, mixed = sx.attach(jax.random.key(0), params, [("q", sx.MoSARA(rank=4))])
    for parts, message in [
        ([], "nothing to merge"),
        ([sx.Weighted(1.0, adapters, other)], "norm/scale: in one of the two models only"),
        ([sx.Weighted(1.0, adapters, narrow)], "norm/scale: (16,) and (8,)"),
        ([sx.Weighted(1.0, {"head": adapters["layers"]["q"]})], "head/kernel: there is an adapter but no kernel"),
        ([sx.Weighted(1.0, mixed)], "MoSARA cannot be merged"),
    ]:
        with pytest.raises(sx.SboraxError, match=re.escape(message)):
            sx.merge_weighted(params, parts)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(case=st.sampled_from([("LoRA", "float32"), ("SBoRA", "bfloat16"), ("DoRA", "float32")]), seed=st.integers(0, 9))
def test_the_way_back_has_the_bits_of_the_base(case, seed):
    """From the base exactly, and anything else is refused; without it, additive methods come back up to rounding."""
    name, dtype = case
    params, adapters = tuned(base(dtype), RULES[name], seed)
    merged = sx.merge(params, adapters)
    chex.assert_trees_all_equal(sx.unmerge(merged, adapters, params), params)
    later = {**merged, "norm": {"scale": merged["norm"]["scale"].at[3].multiply(1.5)}}
    with pytest.raises(sx.SboraxError, match="norm/scale: the merged weight is not that of this base"):
        sx.unmerge(later, adapters, params)
    if name == "DoRA":
        return
    back = sx.merge(merged, sx.scale(adapters, -1.0))
    for path, node in nodes(adapters).items():
        own, again, after = (flatten(tree)[path] for tree in (params, back, merged))
        own, again, after = (np.asarray(leaf, np.float32) for leaf in (own, again, after))
        digits = float(jnp.finfo(dtype).eps)
        assert (np.abs(again - own) <= digits * (np.abs(own) + 2 * np.abs(after))).all()
        if name == "SBoRA":
            still = np.ones(own.shape[:2], bool)
            np.put_along_axis(still, np.asarray(node.frozen["idx"]), False, axis=1)
            assert (again.view(np.uint32) == own.view(np.uint32))[still].all()
