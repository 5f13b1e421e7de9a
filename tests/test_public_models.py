"""Adapters inside models of published packages: NanoMoE of nano-moe-jax (Linen), Mamba-2 of mamba2-jax (NNX)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mamba2_jax
import nano_moe
import numpy as np
import optax
import pytest
from flax import nnx
from torch_pair import shaken

import sborax as sx
from sborax.adapters.tree import nodes

TOKENS = jax.random.randint(jax.random.key(4), (2, 12), 0, 40)


class Published(NamedTuple):
    """A model with adapters. `logits` has them at the projections, `plain` is the model of its package."""

    params: Any
    adapters: Any
    rules: list[Any]
    logits: Any
    plain: Any


def nano() -> Published:
    """Attention with one kernel for query, key and value, and experts chosen by a router."""
    sizes = dict(vocab_size=40, n_layers=1, n_heads=2, d_model=16, d_ff=32, n_experts=2, top_k=1, block_size=12)
    module = nano_moe.NanoMoE(nano_moe.NanoMoEConfig(**sizes))
    rules = [
        ("MultiHeadAttention_0/Dense_0", sx.LoRA(rank=4)),
        ("MultiHeadAttention_0/Dense_1", sx.DoRA(rank=4)),
        ("expert_", sx.Bone(rank=8)),
    ]
    params = jax.jit(module.init)(jax.random.key(0), TOKENS)["params"]
    params, adapters = sx.attach(jax.random.key(1), params, rules)
    return Published(
        params,
        adapters,
        rules,
        lambda adapters: sx.apply_linen(module, {"params": params}, adapters, TOKENS)[0],
        lambda params: module.apply({"params": params}, TOKENS)[0],
    )


def mamba() -> Published:
    """A state-space model: projections around a convolution and a recurrence."""
    config = mamba2_jax.Mamba2Config(
        vocab_size=40, hidden_size=16, state_size=8, head_dim=8, chunk_size=8, num_hidden_layers=2
    )
    model = mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    graph, state, variables = nnx.split(model, nnx.Param, ...)
    rules = [
        sx.Rule("mixer/in_proj", sx.LoRA(rank=4), layers=(0,)),
        sx.Rule("mixer/in_proj", sx.Bone(rank=8), layers=(1,)),
        ("mixer/out_proj", sx.DoRA(rank=4)),
    ]
    params, adapters = sx.attach(jax.random.key(1), nnx.to_pure_dict(state), rules)

    def plain(params):
        full = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(full, params)
        return nnx.merge(graph, full, variables)(TOKENS)["logits"]

    return Published(params, adapters, rules, lambda adapters: sx.adapt_nnx(model, adapters)(TOKENS)["logits"], plain)


PUBLISHED = {"nano_moe": nano, "mamba2_jax": mamba}


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:]).mean()


@pytest.fixture(scope="module", autouse=True)
def rank_promotion():
    """These packages multiply arrays of different ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request) -> Published:
    return PUBLISHED[request.param]()


def test_logits_and_gradients_are_those_of_the_merged_model(published):
    train, frozen = sx.split(shaken(published.adapters))

    def inside(train):
        logits = published.logits(sx.combine(train, frozen))
        return cross_entropy(logits), logits

    def merged(train):
        logits = published.plain(sx.merge(published.params, sx.combine(train, frozen)))
        return cross_entropy(logits), logits

    with jax.default_matmul_precision("highest"):
        (_, ours), slopes = jax.jit(jax.value_and_grad(inside, has_aux=True))(train)
        (_, theirs), expected_slopes = jax.jit(jax.value_and_grad(merged, has_aux=True))(train)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(ours - published.plain(published.params))).max() > 1e-2
    compared = set()
    for path, node in nodes(sx.combine(slopes, frozen)).items():
        assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(node.train)), path
        # DoRA takes its norms as constants, which a merged weight does not.
        if not isinstance(node.method, sx.DoRA):
            expected = nodes(sx.combine(expected_slopes, frozen))[path]
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), node.train, expected.train
            )
            compared.add(type(node.method))
    assert compared == {sx.LoRA, sx.Bone}


def test_training_lowers_the_loss_and_the_adapter_returns_from_its_file(published, tmp_path):
    train, frozen = sx.split(published.adapters)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(train, state):
        loss, slopes = jax.value_and_grad(lambda train: cross_entropy(published.logits(sx.combine(train, frozen))))(
            train
        )
        updates, state = optimizer.update(slopes, state, train)
        return optax.apply_updates(train, updates), state, loss

    state, losses = optimizer.init(train), []
    for _ in range(8):
        train, state, loss = step(train, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05

    trained = sx.combine(train, frozen)
    sx.save_adapter(tmp_path / "adapter", trained, rules=published.rules)
    params, copy = sx.load_adapter(tmp_path / "adapter", published.params)
    jax.tree.map(np.testing.assert_array_equal, params, published.params)
    jax.tree.map(np.testing.assert_array_equal, copy, trained)
    np.testing.assert_array_equal(published.logits(copy), published.logits(trained))
    # The keys of the parameters, numbers for NNX's lists, stay as they were wherever parameters are returned.
    halved = sx.merge_weighted(published.params, [sx.Weighted(0.5, copy)])
    assert jax.tree.structure(halved) == jax.tree.structure(published.params)


def test_trained_leaves_of_an_adapted_nnx_model_are_found_by_its_optimiser():
    """The loop of NNX itself: `nnx.Optimizer` over `sx.Trained`, and no other variable moves."""
    config = mamba2_jax.Mamba2Config(
        vocab_size=40, hidden_size=16, state_size=8, head_dim=8, chunk_size=8, num_hidden_layers=1
    )
    model = mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    rules = [("in_proj", sx.LoRA(rank=4)), ("out_proj", sx.Bone(rank=8))]
    _, adapters = sx.attach(jax.random.key(1), nnx.to_pure_dict(nnx.state(model, nnx.Param)), rules)
    adapted = sx.adapt_nnx(model, adapters)
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=sx.Trained)

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, sx.Trained)
        loss, slopes = nnx.value_and_grad(lambda model: cross_entropy(model(TOKENS)["logits"]), argnums=wrt)(model)
        optimizer.update(model, slopes)
        return loss

    losses = [float(step(adapted, optimizer)) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05
    jax.tree.map(np.testing.assert_array_equal, nnx.state(adapted, nnx.Param), nnx.state(model, nnx.Param))
    changes = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), sx.split(sx.adapters_nnx(adapted))[0], sx.split(adapters)[0]
    )
    assert all(jax.tree.leaves(changes))
