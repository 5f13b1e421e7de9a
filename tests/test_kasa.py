"""KaSA beside PEFT: what the base loses, and the penalties that the paper adds to the loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from torch_pair import TOKENS, build, logits, with_peft

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft
from sborax.train.kasa_loss import kasa_penalty
from sborax.train.outputs import Outputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base"))


def test_the_base_loses_its_smallest_components(pair):
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", sx.KaSA(rank=5, alpha=3.0))])
    kernels = (tree["layers"]["self_attn"]["q_proj"]["kernel"] for tree in (params, pair.ours.params))
    for remainder, weight in zip(*kernels, strict=True):
        u, s, vt = np.linalg.svd(weight)
        np.testing.assert_allclose(remainder, (u[:, :-5] * s[:-5]) @ vt[:-5], rtol=0, atol=1e-5)
    # b is zero, so that the function is that of the base without them.
    np.testing.assert_allclose(logits(pair.ours, params, adapters), logits(pair.ours, params, None), rtol=0, atol=1e-5)
    assert np.abs(logits(pair.ours, params, None) - logits(pair.ours, pair.ours.params, None)).max() > 1e-3
    with pytest.raises(sx.SboraxError, match="less than the smaller side"):
        sx.plan(pair.ours.abstract(), [("q_proj", sx.KaSA(rank=32))])


def test_penalties_are_those_of_peft(pair, tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], kasa_config=peft.KasaConfig(0.3, 0.07))
    theirs = with_peft(pair, config)
    theirs.save_pretrained(tmp_path)
    params, adapters = load_peft(tmp_path, pair.ours)
    penalty = kasa_penalty(adapters, 0.3, 0.07)
    np.testing.assert_allclose(penalty, theirs.base_model._get_kasa_loss().item(), rtol=1e-5)
    # A step divides by the number of targets that count: what is left is the mean and the penalty.
    tokens = jnp.asarray(TOKENS[:, :-1])
    counts = jnp.ones(tokens.shape, bool).at[0, :3].set(False)
    batch = {"targets": jnp.asarray(TOKENS[:, 1:]), "counts": counts}
    outputs = Outputs(pair.ours.hidden(params, adapters, tokens), batch, pair.ours, params, adapters)
    (total, items), (plain, count) = sx.KaSALoss(0.3, 0.07)(outputs), sx.CrossEntropy()(outputs)
    assert items == count == counts.sum()
    np.testing.assert_allclose(total / items, plain / items + penalty, rtol=1e-5)
    assert sx.KaSALoss().by_token(outputs)[0] == sx.CrossEntropy().by_token(outputs)[0]
    assert nodes(adapters)
    with pytest.raises(sx.SboraxError, match="KaSALoss: no kernel has KaSA"):
        kasa_penalty({}, 1.0, 1.0)


def distance(rows):
    """How far the products of rows are from the identity."""
    return np.linalg.norm(rows @ rows.T - np.eye(len(rows)))


def test_penalties_are_of_every_layer_that_has_kasa(pair):
    """In rules for some layers, in sums and in multiples, and not of layers without it."""
    method = sx.KaSA(rank=3)
    rules = [
        sx.Rule("q_proj", method, layers=(1,)),
        ("v_proj", sx.scale(sx.add(method, sx.LoRA(rank=2)), 0.5)),
        ("up_proj", sx.LoRA(rank=2)),
    ]
    adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)[1]
    q, v = (nodes(adapters)[f"layers/self_attn/{name}/kernel"].train for name in ("q_proj", "v_proj"))
    of_layers = [(q["0"], 1), (v["part"]["0"], 0), (v["part"]["0"], 1)]
    expected = sum(
        0.3 * np.square(leaves["e"][layer]).sum()
        + 0.07 * (distance(leaves["a"][layer].T) + distance(leaves["b"][layer]))
        for leaves, layer in of_layers
    )
    np.testing.assert_allclose(kasa_penalty(adapters, 0.3, 0.07), expected, rtol=1e-5)


def test_a_loss_without_adapters_has_no_penalty(pair):
    """Such as the one whose gradients LoRAGA starts from, beside KaSA. In a step there must be one."""
    tokens = jnp.asarray(TOKENS[:, :-1])
    batch = {"targets": jnp.asarray(TOKENS[:, 1:]), "counts": jnp.ones(tokens.shape, bool)}
    params = pair.ours.params
    outputs = Outputs(pair.ours.hidden(params, None, tokens), batch, pair.ours, params, {})
    assert sx.KaSALoss()(outputs)[0] == sx.CrossEntropy()(outputs)[0]
    with pytest.raises(sx.SboraxError, match="KaSALoss: no kernel has KaSA"):
        sx.KaSALoss()(dataclasses.replace(outputs, key=jax.random.key(0)))
