"""The contract beside a kernel: what a method makes of the projection's bias, on bare kernels and against PEFT."""

import copy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from bare_kernels import (
    SETTINGS,
    assert_close,
    base,
    biases,
    by_few,
    fitted,
    hints,
    host,
    inputs,
    linear,
    merged,
    normal,
    standalone,
    tolerance,
    trained,
)
from cases import Case
from nightly import nightly_unless
from peft_configs import FILES, KINDS
from torch_pair import build, logits, reloaded, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.tree import nodes, over_stack, stack_of
from sborax.interop.peft import load_peft, save_peft
from sborax.interop.peft_table import TABLE
from sborax.models import save_hf

PEFT = {**KINDS, **FILES}


@jax.jit
def biased(x, weight, node, bias):
    return over_stack(lambda w, n, b: linear(x, w, n, bias=b), stack_of(node))(weight, node, bias)


@jax.jit
def added_after(x, weight, node, bias):
    """The projection, and then the bias: what a method does that leaves the bias alone."""

    def project(w, n, b):
        y = linear(x, w, n)
        return y + jnp.broadcast_to(b, y.shape)

    return over_stack(project, stack_of(node))(weight, node, bias)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("dtype", "stacked", "quantised"), [SETTINGS[0], SETTINGS[3], SETTINGS[5]])
@by_few
def test_the_adapted_bias_is_that_of_the_merged_projection(case: Case, dtype, stacked, quantised):
    weight, node = fitted(case.method, dtype, stacked, quantised, biased=True)
    node, x, bias = trained(node), inputs(dtype), biases(dtype, stacked)
    y = biased(x, weight, node, bias)
    assert y.dtype == x.dtype
    if not case.method.adapts_bias:
        chex.assert_trees_all_equal(y, added_after(x, weight, node, bias))
    if case.method.no_merge:
        return
    params = {"layers": {"proj": {"kernel": weight, "bias": bias}}}
    beside = jax.jit(sx.merge)(params, {"layers": {"proj": {"kernel": node}}})["layers"]["proj"]["bias"]
    assert beside.dtype == bias.dtype
    assert np.array_equal(beside, bias) != case.method.adapts_bias
    added = beside[:, None] if stacked else beside[None]
    assert_close(y, host(x) @ host(merged(weight, node)) + host(added), tolerance(dtype))


@pytest.mark.usefixtures("strict")
@by_few
def test_unselected_layers_keep_their_bias_bit_for_bit(case: Case):
    params = {"layers": {"proj": {"kernel": base(), "bias": biases("float32", True)}}}
    rule = sx.Rule("proj", case.method, layers=(0, -1))
    params, adapters = sx.attach(jax.random.key(0), params, [rule], hints(case.method, True))
    proj, node, x = params["layers"]["proj"], trained(standalone(adapters)), inputs()
    y = biased(x, proj["kernel"], node, proj["bias"])
    plain = jax.jit(lambda: jax.lax.map(lambda layer: sx.linear(x, layer[0], bias=layer[1]), (base(), proj["bias"])))()
    chex.assert_trees_all_equal(y[1], plain[1])
    assert not np.array_equal(y[0], plain[0]) and not np.array_equal(y[2], plain[2])
    if not case.method.no_merge:
        dense = sx.merge(params, {"layers": {"proj": {"kernel": node}}})["layers"]["proj"]
        chex.assert_trees_all_equal(dense["bias"][1], proj["bias"][1])
        assert_close(y, host(x) @ host(dense["kernel"]) + host(dense["bias"])[:, None], 2e-5)


@pytest.mark.usefixtures("strict")
def test_a_foreign_bias_of_several_axes_is_adapted_and_a_misshapen_one_named():
    """Flax's DenseGeneral: kernel (in, heads, features), bias (heads, features)."""
    kernel, bias = jnp.asarray(normal(1, 16, 2, 6)), jnp.asarray(normal(2, 2, 6))
    params = {"query": {"kernel": kernel, "bias": bias}}
    params, adapters = sx.attach(jax.random.key(0), params, [sx.Rule("query", sx.IA3(), in_axes=1)])
    adapters = shaken(adapters)
    dense, x = sx.merge(params, adapters)["query"], jnp.asarray(normal(3, 5, 16))
    y = sx.linear(x, kernel.reshape(16, 12), adapters["query"]["kernel"], bias=bias.reshape(-1))
    assert_close(y, host(x) @ host(dense["kernel"]).reshape(16, 12) + host(dense["bias"]).reshape(-1), 2e-5)
    with pytest.raises(sx.SboraxError, match=r"^query/bias: IA3 adapts the bias, which has shape \(12,\) here"):
        sx.merge({"query": {"kernel": kernel, "bias": jnp.zeros(12)}}, adapters)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("biased"), attention_bias=True, mlp_bias=True)


def test_every_kind_of_peft_adapter_is_compared_on_a_biased_model():
    assert {row.peft_type for row in TABLE} <= {config.peft_type.value for config in PEFT.values()}


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:(PiSSA|OLoRA) changes the base weights:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
)
@pytest.mark.parametrize("kind", nightly_unless(list(PEFT)[::3], PEFT))
def test_peft_and_every_merge_agree_on_a_biased_model(kind, pair, tmp_path):
    theirs = with_peft(pair, copy.deepcopy(PEFT[kind]))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(pair.torch)).max() > 0.01
    base, (params, adapters) = pair.ours.params, load_peft(tmp_path / "theirs", pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, rtol=0, atol=1e-4)
    assert save_peft(tmp_path / "ours", pair.ours, params, adapters).errors == {}
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, rtol=0, atol=1e-4)

    if any(node.method.no_merge for node in nodes(adapters).values()):
        with pytest.raises(sx.SboraxError, match="cannot be merged"):
            sx.merge(params, adapters)
        return
    dense = sx.merge(params, adapters)
    np.testing.assert_allclose(logits(pair.ours, dense, {}), expected, rtol=0, atol=1e-4)
    average = sx.merge_weighted(base, [sx.Weighted(0.25, adapters, params), sx.Weighted(0.75, adapters, params)])
    np.testing.assert_allclose(logits(pair.ours, average, {}), expected, rtol=0, atol=1e-4)
    assert sx.unmerge(dense, adapters, params) is params
    save_hf(tmp_path / "merged", pair.ours, dense)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    np.testing.assert_allclose(torch_logits(theirs), expected, rtol=0, atol=1e-4)


def test_plain_lora_cannot_hold_an_adapted_bias(pair, tmp_path):
    for rule, problem in [("k_proj", "adapts the bias, too"), ("lm_head", None)]:
        params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [(rule, sx.IA3())])
        if problem is None:
            save_peft(tmp_path / rule, pair.ours, params, shaken(adapters), as_="lora", rank=4)
            continue
        with pytest.raises(sx.SboraxError, match=rf"{rule}: IA3 {problem}"):
            save_peft(tmp_path / rule, pair.ours, params, adapters, as_="lora", rank=4)
