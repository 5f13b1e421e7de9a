"""VeLoRA beside PEFT: its gradients, and what it keeps for the backward pass, against LoRA."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from bare_kernels import normal
from tiny_model import WIDE
from torch_pair import TOKENS, build, with_peft

import sborax as sx
from sborax.adapters.leaves import nest
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft
from sborax.plans.ahead import compiled, outline
from sborax.train.step import sums

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def nightly_unless_first(rows):
    return [rows[0], *(pytest.param(*row, marks=pytest.mark.nightly) for row in rows[1:])]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    ("start", "groups", "scale"),
    nightly_unless_first([("batch_average", 7, 0.5), ("batch_average", 8, 1.0), ("random", 64, 2.0)]),
)
def test_gradients_are_those_of_peft(pair, tmp_path, start, groups, scale):
    velora = peft.VeloraConfig(num_groups=groups, scale=scale, init_type=start)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], velora_config=velora)
    theirs = with_peft(pair, config).train()
    theirs.save_pretrained(tmp_path / "adapter")
    slope = normal(3, *TOKENS.shape, pair.ours.config.vocab_size)
    (theirs(torch.tensor(TOKENS, dtype=torch.long)).logits * torch.tensor(slope)).sum().backward()

    params, adapters = load_peft(tmp_path / "adapter", pair.ours)

    def gradients(adapters):
        train, frozen = sx.split(adapters)

        def loss(train):
            return jnp.sum(pair.ours.apply(params, sx.combine(train, frozen), jnp.asarray(TOKENS)) * slope)

        return nodes(jax.jit(jax.grad(loss))(train))

    ours = gradients(adapters)
    plain = {
        path: dataclasses.replace(node, frozen={"scale": node.frozen["scale"]}, method=sx.LoRA(rank=3))
        for path, node in nodes(adapters).items()
    }
    exact_gradients = gradients(nest(plain))
    # PEFT's gradients through its files.
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    expected = nodes(load_peft(tmp_path / "gradients", pair.ours)[1])
    for path, node in ours.items():
        for name, leaf in node.train.items():
            size = np.abs(leaf).max()
            np.testing.assert_allclose(
                leaf, expected[path].train[name], rtol=0, atol=1e-4 * size, err_msg=f"{path} {name}"
            )
        # b's gradient is exact, a's is not.
        exact = exact_gradients[path].train
        np.testing.assert_allclose(node.train["b"], exact["b"], rtol=0, atol=1e-5 * np.abs(exact["b"]).max())
        assert np.abs(node.train["a"] - exact["a"]).max() > 0.1 * np.abs(exact["a"]).max()


GROUPS, ROWS, LENGTH = 16, 8, 64
ALL = "self_attn|mlp"


def step_of(method, pattern, remat):
    experiment = sx.Experiment(
        "x", sx.Data("x", max_length=LENGTH), [(pattern, method)], steps=1, batch_size=ROWS, remat=remat
    )
    return outline(experiment, WIDE)


def residual_bytes(method, pattern, remat):
    """Bytes that the forward pass keeps for the gradients of the adapters, for each token and layer."""
    plan = step_of(method, pattern, remat)

    def backward(train, frozen, base, batch):
        part = jax.tree.map(lambda leaf: leaf[0], batch)

        def loss(adapters):
            trees = {"adapters": adapters, "base": {}}
            return sums(plan.model, trees, frozen, base, part, None).losses["loss"]

        return jax.vjp(loss, train["adapters"])[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, plan.state.train, *plan.arguments[1:]))
    tokens = ROWS * LENGTH * WIDE.num_hidden_layers
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) / tokens


@pytest.mark.parametrize(
    ("pattern", "width"),
    nightly_unless_first([("down_proj", WIDE.intermediate_size), ("q_proj", WIDE.hidden_size)]),
)
def test_sub_tokens_are_kept_in_place_of_inputs(pattern, width):
    """Where layers recompute nothing. By default a run recomputes inputs, and VeLoRA keeps no less than LoRA."""
    lora, velora = sx.LoRA(rank=4), sx.VeLoRA(rank=4, groups=GROUPS)
    saved = residual_bytes(lora, pattern, "none") - residual_bytes(velora, pattern, "none")
    assert saved == pytest.approx(4 * (width - GROUPS), abs=40)
    assert residual_bytes(velora, pattern, "cheap") == pytest.approx(residual_bytes(lora, pattern, "cheap"), abs=1)


@pytest.mark.nightly
@pytest.mark.usefixtures("compiled_fully")
def test_a_step_has_fewer_temporaries_where_nothing_is_recomputed():
    lora, velora = (
        compiled(step_of(method, ALL, "none")).memory_analysis().temp_size_in_bytes
        for method in (sx.LoRA(rank=4), sx.VeLoRA(rank=4, groups=GROUPS))
    )
    assert velora < 0.85 * lora
