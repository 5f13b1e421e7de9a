"""Several adapters in one base: against PEFT, against single merges, bit for bit where nothing changes; and back."""

import copy
import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from bare_kernels import assert_close, fitted, masks, trained
from cases import METHODS
from hypothesis import given, settings
from hypothesis import strategies as st
from nightly import nightly_unless
from torch_pair import build, logits, reloaded, shake, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.arithmetic import by_layer
from sborax.adapters.leaves import nest
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft
from sborax.interop.weighted_lora import weighted_lora
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
    kernel = thin[0].self_attn.q_proj.weight.detach().numpy().T
    assert np.abs(np.asarray(ours["self_attn"]["q_proj"]["kernel"][0]) - kernel).max() > 1e-3


KINDS = [
    ("svd", {}), ("linear", {}),
    *(
        (f"{function}{tail}", {"density": 0.4, **sign})
        for tail in ("", "_svd")
        for function, sign in [
            ("ties", {}), ("ties", {"majority_sign_method": "frequency"}), ("magnitude_prune", {}), ("dare_linear", {}),
            ("dare_ties", {"majority_sign_method": "frequency"}),
        ]
    ),
    ("cat", {}),
]  # fmt: skip


def checkerboard(shape):
    """A mask that a matrix and its transpose share, in place of what the two draw."""
    return np.add.outer(*(np.arange(size) for size in shape)) % 5 < 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("subset", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_combinations_are_those_of_peft(subset, tmp_path, monkeypatch):
    """Every kind of `add_weighted_adapter`, three adapters, one weight negative: merged weights, and the LoRA's change.

    DARE's masks are the same on both sides.
    """
    pair, weights, names = build(tmp_path / "base"), [0.7, -0.4, 1.3], ["default", "second", "third"]
    theirs = with_peft(pair, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    for number, modules in [(1, ["q_proj", "up_proj"]), (2, ["q_proj", "up_proj", "v_proj"])]:
        theirs.add_adapter(names[number], peft.LoraConfig(r=4, lora_alpha=3 * number, target_modules=modules))
        theirs.set_adapter(names[number])
        shake(theirs, number)
    theirs.save_pretrained(tmp_path / "peft")
    parts = []
    for weight, place in zip(weights, (".", "second", "third"), strict=True):
        params, adapters = load_peft(tmp_path / "peft" / place, pair.ours)
        parts.append(sx.Weighted(weight, adapters, params))
    monkeypatch.setattr(torch, "bernoulli", lambda chances: torch.tensor(checkerboard(chances.shape)).to(chances))
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, chance, shape: jnp.asarray(checkerboard(shape)))
    for number, (kind, options) in enumerate(KINDS):
        if subset and kind != "dare_ties":
            continue
        model = copy.deepcopy(theirs)
        model.add_weighted_adapter(names, weights, str(number), combination_type=kind, **options)
        model.set_adapter(str(number))
        layers = model.merge_and_unload().model.layers
        combination = sx.Combination(kind, **options)
        # PEFT keeps as many singular vectors as an adapter has.
        truncated = dataclasses.replace(combination, rank=4) if kind.endswith("svd") else combination
        merged = sx.merge_weighted(pair.ours.params, parts, truncated, jax.random.key(0))
        lora = sx.weighted_lora(pair.ours.params, parts, combination, jax.random.key(0))
        from_lora = sx.merge(pair.ours.params, lora)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
            group, name = module.split(".")
            for layer in range(2):
                want = layers[layer].get_submodule(module).weight.detach().numpy().T
                for tree in (merged, from_lora):
                    got = np.asarray(tree["layers"][group][name]["kernel"][layer])
                    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5, err_msg=f"{kind} {options} {module}")


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_combined_lora_is_read_by_peft(tmp_path):
    """DoRA and OFT on one kernel and a single layer of another, as LoRA of rank 5."""
    pair = build(tmp_path / "base")
    rules = [[("q_proj", sx.DoRA(3))], [("q_proj", sx.OFT(block=4)), sx.Rule("up_proj", sx.LoRA(2), layers=(1,))]]
    parts = [sx.Weighted(0.5, tuned(pair.ours.params, group, seed)[1]) for seed, group in enumerate(rules)]
    combination = sx.Combination("ties_svd", density=0.5, rank=5)
    lora = sx.weighted_lora(pair.ours.params, parts, combination)
    sx.save_peft(tmp_path / "out", pair.ours, pair.ours.params, lora)
    want = logits(pair.ours, sx.merge_weighted(pair.ours.params, parts, combination), None)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "out")), want, rtol=0, atol=1e-4)
    assert np.abs(want - logits(pair.ours, pair.ours.params, None)).max() > 1e-2


@pytest.mark.usefixtures("strict")
def test_what_dare_drops_follows_from_key_path_and_layer():
    """A stack drops what its layers drop, as many as it should, and the mean of many draws is the change."""
    params, key = base(), jax.random.key(5)
    parts = [sx.Weighted(1.0, tuned(params, [("q", sx.LoRA(8))])[1])]
    kernel = params["layers"]["q"]["kernel"]
    change = sx.merge_weighted(params, parts)["layers"]["q"]["kernel"] - kernel
    dare = sx.Combination("dare_linear_svd", density=0.25)
    draw = jax.jit(lambda key: sx.merge_weighted(params, parts, dare, key)["layers"]["q"]["kernel"] - kernel)
    draws = jax.lax.map(draw, jax.random.split(key, 400))
    assert abs(float((draws != 0).mean()) - 0.25) < 0.005
    np.testing.assert_allclose(draws.mean(0), change, rtol=0, atol=5 * float(jnp.abs(change).max()) * (3 / 400) ** 0.5)


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
def test_layers_are_combined_each_by_itself():
    """A stack is combined as its layers are, where an adapter acts on one of them alone, too."""
    params, key = base(), jax.random.key(5)
    kernel = params["layers"]["q"]["kernel"]
    rules = [[("q", sx.LoRA(3, alpha=2.0))], [sx.Rule("q", sx.LoRA(3), layers=(1,))]]
    parts = [sx.Weighted(0.6, tuned(params, rule, seed)[1]) for seed, rule in enumerate(rules)]
    flat = {"layers": {str(i): {"q": {"kernel": kernel[i]}} for i in range(2)}}
    flat_nodes = []
    for part in parts:
        ((child, layers),) = by_layer(nodes(part.adapters)["layers/q/kernel"])
        apart = {i: jax.tree.map(lambda leaf, i=i: leaf[i], child) for i in layers or range(2)}
        flat_nodes.append({"layers": {str(i): {"q": {"kernel": node}} for i, node in apart.items()}})
    for combination in (
        sx.Combination("ties_svd", density=0.3),
        sx.Combination("dare_linear", density=0.5),
        sx.Combination("linear"),
        sx.Combination("svd", rank=2),
    ):
        got = sx.merge_weighted(flat, [sx.Weighted(0.6, node) for node in flat_nodes], combination, key)["layers"]
        want = sx.merge_weighted(params, parts, combination, key)["layers"]["q"]["kernel"]
        chex.assert_trees_all_close(jnp.stack([got[str(i)]["q"]["kernel"] for i in range(2)]), want, atol=1e-6)
        assert np.abs(want - kernel).max(axis=(1, 2)).min() > 1e-3


@pytest.mark.usefixtures("strict")
def test_combinations_that_mean_nothing_are_refused():
    params = base()
    plain, wide, dora = (sx.Weighted(1.0, tuned(params, [("q", m)])[1]) for m in (sx.LoRA(2), sx.LoRA(3), sx.DoRA(2)))
    norms = sx.Weighted(1.0, plain.adapters, {**params, "norm": {"scale": params["norm"]["scale"] + 1.0}})
    for make, message in [
        (lambda: sx.Combination("tie"), "combination must be one of cat, linear"),
        (lambda: sx.Combination("ties"), "'ties' needs a density in (0, 1], got None"),
        (lambda: sx.Combination("ties", 1.5), "got 1.5"),
        (lambda: sx.Combination("svd", 0.5), "'svd' prunes nothing"),
        (lambda: sx.Combination("cat", rank=2), "rank must be 1 or more"),
        (lambda: sx.Combination("ties", 0.5, "sum"), "majority_sign_method must be"),
        (lambda: sx.merge_weighted(params, [plain, wide], sx.Combination("linear")), "adapters of one rank, got 2, 3"),
        (lambda: sx.merge_weighted(params, [dora], sx.Combination("linear")), "DoRA is more than a pair of factors"),
        (lambda: sx.weighted_lora(params, [dora]), "layers/q/kernel: DoRA is more than a pair of factors"),
        (lambda: sx.merge_weighted(params, [norms], sx.Combination("svd")), "norm/scale: was trained beside adapters"),
        (lambda: sx.merge_weighted(params, [norms], sx.Combination("linear")), "norm/scale: this part changes it"),
        (lambda: sx.merge_weighted(params, [plain], sx.Combination("dare_ties", 0.5)), "at random; give a key"),
    ]:
        with pytest.raises(sx.SboraxError, match=re.escape(message)):
            make()


@pytest.mark.usefixtures("strict")
def test_every_part_adds_its_own_change():
    """W + sum of w (W_i - W) in float64, over methods that see W, rewrite it, or move other leaves of the base."""
    params = base()
    parts, want = [], jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for number, (name, rules) in enumerate(RULES.items()):
        weights, adapters = tuned(params, rules, number)
        if name == "LoRA":
            weights = {**weights, "norm": {"scale": weights["norm"]["scale"] + 0.5}}
        weight = 0.3 * number - 0.7
        parts.append(sx.Weighted(weight, adapters, weights))
        alone = sx.merge(weights, adapters)
        want = jax.tree.map(
            lambda sum_, end, start, weight=weight: sum_ + weight * (np.float64(end) - np.float64(start)),
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
    parts = [sx.Weighted(weight, tree) for weight, tree in zip((0.6, 0.7), adapters, strict=True)]
    got, exact = sx.merge_weighted(half, parts), sx.merge_weighted(wide, parts)
    chex.assert_trees_all_equal(got, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), exact))
    for path in ("q", "up"):
        mask = np.zeros((2, 16), bool)
        for tree in adapters:
            np.put_along_axis(mask, np.asarray(tree["layers"][path]["kernel"].frozen["idx"]), True, axis=1)
        bits = [np.asarray(tree["layers"][path]["kernel"]).view(np.uint16) for tree in (got, half)]
        assert ((bits[0] != bits[1]).any(axis=2) == mask).all() and mask.any() and not mask.all()


@pytest.mark.usefixtures("strict")
def test_a_change_of_a_quantised_base_moves_the_dense_one():
    params = {"layers": {"q": {"kernel": jax.random.normal(jax.random.key(3), (2, 64, 32))}}}
    packed = {"layers": {"q": {"kernel": quantise(params["layers"]["q"]["kernel"])}}}
    _, adapters = tuned(packed, [("q", sx.LoRA(2))])
    got = sx.merge_weighted(params, [sx.Weighted(2.0, adapters, packed, packed)])
    want = sx.merge(params, sx.scale(adapters, 2.0))
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-6)
    assert np.abs(packed["layers"]["q"]["kernel"].dense() - params["layers"]["q"]["kernel"]).max() > 0.05


def test_what_cannot_be_merged_is_named():
    params = base()
    _, adapters = tuned(params, RULES["LoRA"])
    bare = {"layers": params["layers"]}
    narrow = {**params, "norm": {"scale": jnp.ones(8)}}
    _, mixed = sx.attach(jax.random.key(0), params, [("q", sx.MoSARA(rank=4))])
    for parts, message in [
        ([], "nothing to merge"),
        ([sx.Weighted(1.0, adapters, bare)], "norm/scale: in one of the two models only"),
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
        start, inverse, end = (flatten(tree)[path] for tree in (params, back, merged))
        start, inverse, end = (np.asarray(leaf, np.float32) for leaf in (start, inverse, end))
        digits = float(jnp.finfo(dtype).eps)
        assert (np.abs(inverse - start) <= digits * (np.abs(start) + 2 * np.abs(end))).all()
        if name == "SBoRA":
            still = np.ones(start.shape[:2], bool)
            np.put_along_axis(still, np.asarray(node.frozen["idx"]), False, axis=1)
            assert (inverse.view(np.uint32) == start.view(np.uint32))[still].all()


PAIRS = {case.name: case for case in METHODS if getattr(case.method, "pair", False) and not case.method.rewrites_base}


@pytest.mark.parametrize(
    "name", nightly_unless([next(iter(PAIRS)), *(name for name in PAIRS if masks(PAIRS[name].method))], PAIRS)
)
def test_the_factors_of_one_part_make_its_change(name):
    weight, node = fitted(PAIRS[name].method)
    params, adapters = {"layers": {"proj": {"kernel": weight}}}, {"layers": {"proj": {"kernel": trained(node)}}}
    for combination in (sx.Combination("linear"), sx.Combination("cat")):
        one = weighted_lora(params, [sx.Weighted(1.0, adapters)], combination)
        got, expected = (sx.merge(params, tree)["layers"]["proj"]["kernel"] for tree in (one, adapters))
        assert_close(got, expected, 1e-5)
