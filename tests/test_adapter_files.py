"""Adapter directories: every leaf and every bit comes back, rewritten base included."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import sborax as sx
from sborax.adapters.tree import split
from sborax.models.nf4 import NF4Array
from sborax.records.adapter import LEAVES, PLAN, fingerprint, load_adapter, read_adapter, save_adapter
from sborax.train.base import adapt, quantise_base

RULES = {
    "lora": [("mlp", sx.LoRA(rank=3, alpha=6.0, dropout=0.1)), ("attn", sx.SBoRA(rank=4))],
    "bone": [("mlp", sx.Bone(rank=4)), ("attn", sx.Bat(rank=4))],
    "pissa": [("mlp", sx.PiSSA(rank=3, alpha=6.0)), ("attn", sx.chain(sx.OLoRA(rank=3), sx.DoRA()))],
    "by_layer": [sx.Rule("mlp", sx.PiSSA(rank=3), layers=(0, 2)), sx.Rule("mlp", sx.LoRA(rank=2))],
    "sum": [("mlp", sx.add(sx.PiSSA(rank=3), sx.SBoRA(rank=2), sx.OLoRA(rank=2)))],
    "scaled": [("mlp", sx.scale(sx.LoRA(rank=(1, 2, 3)), 0.5))],
}


def base(dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "layers": {
            "mlp": {"kernel": jax.random.normal(keys[0], (3, 64, 128)).astype(dtype)},
            "attn": {"kernel": jax.random.normal(keys[1], (3, 64, 64)).astype(dtype)},
        },
        "norm": {"scale": jax.random.normal(keys[2], (64,)).astype(dtype)},
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_round_trip_is_exact(tmp_path, name, dtype):
    weights = base(dtype)
    params, adapters = sx.attach(jax.random.key(1), weights, RULES[name])
    # What training would leave in the trained leaves.
    adapters = sx.combine(jax.tree.map(lambda leaf: leaf + 1, sx.split(adapters)[0]), sx.split(adapters)[1])
    save_adapter(tmp_path, adapters, rules=RULES[name], base=fingerprint(weights), about={"model": "m"})
    restored, copy = load_adapter(tmp_path, base(dtype))
    chex.assert_trees_all_equal(copy, adapters)
    chex.assert_trees_all_equal(restored, params)
    saved = read_adapter(tmp_path)
    assert saved.rules == tuple(rule if isinstance(rule, sx.Rule) else sx.Rule(*rule) for rule in RULES[name])
    assert saved.about == {"model": "m"}


def test_trained_base_leaves_come_back(tmp_path):
    trained = {"norm/scale": jnp.arange(64, dtype=jnp.float32)}
    save_adapter(tmp_path, {}, trained_base=trained)
    params, adapters = load_adapter(tmp_path, base(jnp.bfloat16))
    assert adapters == {} and params["norm"]["scale"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(params["norm"]["scale"], trained["norm/scale"].astype(jnp.bfloat16))
    chex.assert_trees_all_equal(params["layers"], base(jnp.bfloat16)["layers"])


def test_another_base_is_refused_and_another_precision_is_not(tmp_path):
    weights = base(jnp.bfloat16)
    _, adapters = sx.attach(jax.random.key(1), weights, RULES["lora"])
    save_adapter(tmp_path, adapters, base=fingerprint(weights))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), weights)
    chex.assert_trees_all_equal(load_adapter(tmp_path, wide), (wide, adapters))
    with pytest.raises(sx.SboraxError, match="trained on another base model .* differs"):
        load_adapter(tmp_path, base(jnp.bfloat16, seed=1))
    with pytest.raises(sx.SboraxError, match="norm/scale, which this model lacks"):
        load_adapter(tmp_path, {"layers": weights["layers"]})


def test_damaged_directories(tmp_path):
    with pytest.raises(sx.SboraxError, match="plan.json: missing"):
        read_adapter(tmp_path)
    _, adapters = sx.attach(jax.random.key(1), base(jnp.float32), RULES["lora"])
    save_adapter(tmp_path, adapters)
    content = (tmp_path / LEAVES).read_bytes()
    (tmp_path / LEAVES).write_bytes(content[: len(content) // 2])
    with pytest.raises(sx.SboraxError, match="not a readable adapter"):
        read_adapter(tmp_path)
    (tmp_path / LEAVES).write_bytes(content)
    (tmp_path / PLAN).write_text((tmp_path / PLAN).read_text().replace('"sites": [', '"sites": [], "old": ['))
    with pytest.raises(sx.SboraxError, match="do not belong together"):
        read_adapter(tmp_path)


def test_a_quantised_base_is_what_the_adapters_stand_on(tmp_path):
    weights = base(jnp.float32)
    rules = [("mlp", sx.PiSSA(rank=8)), ("attn", sx.DoRA(rank=4))]
    plan = sx.plan(weights, rules)
    params, adapters = adapt(jax.random.key(1), weights, plan, "nf4")
    assert isinstance(params["layers"]["mlp"]["kernel"], NF4Array) and isinstance(params["norm"]["scale"], jax.Array)
    # PiSSA took its part from the dense weight: what is left is the quantised residual of the dense one.
    residual, dense = sx.attach(jax.random.key(1), weights, rules)
    chex.assert_trees_all_equal(params["layers"]["mlp"], quantise_base(residual, "nf4")["layers"]["mlp"])
    chex.assert_trees_all_equal(split(adapters)[0]["layers"]["mlp"], split(dense)[0]["layers"]["mlp"])
    factors, expected = (tree["layers"]["mlp"]["kernel"].frozen for tree in (adapters, dense))
    chex.assert_trees_all_equal(*({name: tree[name] for name in ("a0", "b0", "scale")} for tree in (factors, expected)))
    # DoRA's norms are those of the quantised weight.
    _, dora = sx.attach(jax.random.key(1), quantise_base(weights, "nf4"), rules[1:])
    chex.assert_trees_all_equal(adapters["layers"]["attn"], dora["layers"]["attn"])
    save_adapter(tmp_path, adapters, base=fingerprint(weights))
    restored, copy = load_adapter(tmp_path, base(jnp.float32))
    restored = quantise_base(restored, "nf4")
    chex.assert_trees_all_equal(restored, params)
    chex.assert_trees_all_equal(sx.rebase(restored, copy), adapters)


def test_a_kernel_that_cannot_be_quantised_is_named():
    odd = {"layers": {"mlp": {"kernel": jnp.ones((2, 40, 8))}}}
    with pytest.raises(sx.SboraxError, match="quant: layers/mlp/kernel: NF4 cuts the input axis"):
        quantise_base(odd, "nf4")


def test_the_fingerprint_sees_a_changed_weight():
    start, end = base(jnp.float32), base(jnp.float32)
    end["norm"]["scale"] = end["norm"]["scale"].at[3].set(9.0)
    changed = {path for path, print_ in fingerprint(start).items() if fingerprint(end)[path] != print_}
    assert changed == {"norm/scale"}
    np.testing.assert_equal(fingerprint(start), fingerprint(base(jnp.float32)))


def leaves_and_plan(tmp_path):
    """The leaves by name and the plan of a saved adapter, and how to write them back."""
    weights = base(jnp.float32)
    _, adapters = sx.attach(jax.random.key(1), weights, [("mlp", sx.PiSSA(rank=3)), ("attn", sx.SBoRA(rank=4))])
    save_adapter(tmp_path, adapters, base=fingerprint(weights), trained_base={"norm/scale": weights["norm"]["scale"]})
    return load_file(tmp_path / LEAVES), json.loads((tmp_path / PLAN).read_text())


def test_any_flipped_bit_is_found_and_its_leaf_named(tmp_path):
    leaves, _ = leaves_and_plan(tmp_path)
    for name, leaf in leaves.items():
        damaged = np.array(leaf)
        damaged.reshape(-1).view(np.uint8)[-1] ^= 1
        save_file({**leaves, name: damaged}, tmp_path / LEAVES)
        with pytest.raises(sx.SboraxError, match=re.escape(f"adapter.safetensors: {name} is damaged")) as caught:
            read_adapter(tmp_path)
        assert "\n" not in str(caught.value)
    save_file(leaves, tmp_path / LEAVES)
    read_adapter(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("digests", [True, False])
def test_leaves_that_are_not_finite_are_named(tmp_path, value, digests):
    weights = base(jnp.float32)
    _, adapters = sx.attach(jax.random.key(1), weights, RULES["lora"])
    node = adapters["layers"]["attn"]["kernel"]
    node.train["b"] = node.train["b"].at[0, 1, 2].set(value)
    save_adapter(tmp_path, adapters, base=fingerprint(weights))
    if not digests:
        plan = json.loads((tmp_path / PLAN).read_text())
        (tmp_path / PLAN).write_text(json.dumps({name: entry for name, entry in plan.items() if name != "digests"}))
    with pytest.raises(sx.SboraxError, match="layers/attn/kernel/train/b is not finite"):
        read_adapter(tmp_path)


def test_files_without_digests_are_read_and_digests_of_other_leaves_are_not(tmp_path):
    leaves, plan = leaves_and_plan(tmp_path)
    digests = plan.pop("digests")
    assert digests.keys() == leaves.keys()
    (tmp_path / PLAN).write_text(json.dumps(plan))
    saved = read_adapter(tmp_path)
    assert "digests" not in saved.about
    for wrong in ({}, [], {**digests, "more": "0"}, 3):
        (tmp_path / PLAN).write_text(json.dumps({**plan, "digests": wrong}))
        with pytest.raises(sx.SboraxError, match="digests do not fit the leaves"):
            read_adapter(tmp_path)
