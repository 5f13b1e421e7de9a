"""PRILoRA: ranks that grow with depth, importance, pruning and regrowth, norms of inputs from a real forward pass."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nightly import nightly_unless
from tiny_model import write_data, write_model

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.layout.state import start, take_apart
from sborax.models import LanguageModel, Llama, LlamaConfig
from sborax.models.layers import feature_norms
from sborax.procedures import Boundary, PRILoRAPruning, Run
from sborax.procedures.prilora import ema, kept
from sborax.records.adapter import read_adapter
from sborax.train.loop import train
from sborax.train.step import make_step

# A step that observes has the bits of one that does not, in programs as users have them.
pytestmark = pytest.mark.usefixtures("strict", "compiled_fully")

PATH = "layers/proj/kernel"
IN, OUT, LAYERS = 20, 12, 3
WEIGHT = jax.random.normal(jax.random.key(1), (LAYERS, IN, OUT))
PARAMS = {"layers": {"proj": {"kernel": WEIGHT}}}


def attached(method, seed=0):
    _, adapters = sx.attach(jax.random.key(seed), PARAMS, [("proj", method)])
    return adapters


def after_steps(plan, adapters, pruning, norms, numbers, state=None):
    """Adapters and the state of the procedure after steps whose inputs had these norms, as a run makes them."""
    run = Run(plan, 90, 1)
    pruning.check(run, {})
    watch, trained = pruning.watch(run), sx.split(adapters)[0]
    state = watch.init(trained) if state is None else state
    for number in numbers:
        _, state = watch.update(trained, state, trained, norms=norms)
        boundary = Boundary(adapters, {}, state)
        if pruning.due(number, run):
            boundary = pruning.apply(jax.random.key(0), number, run, boundary)
        boundary = pruning.settle(boundary)
        adapters, state = boundary.adapters, boundary.opt
    return adapters, state


def test_linear_ranks_of_the_paper():
    ranks = sx.LinearRanks(4, 12).ranks([], range(12), 12)
    assert ranks == (4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12) and sum(ranks) == 96
    assert sx.LinearRanks(1, 2).ranks([], range(3), 3) == (1, 2, 2)
    assert sx.LinearRanks(2, 1).ranks([], range(3), 3) == (2, 2, 1)
    assert sx.LinearRanks(3, 9).ranks([], (0,), 1) == (3,)
    with pytest.raises(sx.SboraxError, match="at least 1"):
        sx.LinearRanks(0, 4)


def test_layers_get_their_own_rank_and_scale_stacked_and_flat():
    method = sx.PRILoRA(rank=sx.LinearRanks(2, 6), alpha=12.0)
    node = nodes(attached(method))[PATH]
    assert node.method.rank == (2, 4, 6)
    np.testing.assert_allclose(node.frozen["scale"], [6.0, 3.0, 2.0])
    flat = {"layers": {str(i): {"proj": {"kernel": WEIGHT[i]}} for i in range(LAYERS)}}
    _, apart = sx.attach(jax.random.key(0), flat, [("proj", method)])
    assert [layer.method.rank for layer in nodes(apart).values()] == [2, 4, 6]
    assert sx.count(apart) == sx.count({"k": node}) == 12 * (IN + OUT)
    constant = nodes(attached(dataclasses.replace(method, scale_mode="constant")))[PATH]
    np.testing.assert_allclose(constant.frozen["scale"], [12.0] * 3)


def test_equal_ranks_and_no_pruning_are_lora():
    method = sx.PRILoRA(rank=4, alpha=8.0)
    ours, lora = attached(method), attached(sx.LoRA(rank=4, alpha=8.0))
    node, lora_node = nodes(ours)[PATH], nodes(lora)[PATH]
    chex.assert_trees_all_equal(node.train, lora_node.train)
    chex.assert_trees_all_equal(node.frozen["scale"], lora_node.frozen["scale"])
    plan, norms = sx.plan(PARAMS, [("proj", method)]), {PATH: jnp.ones((LAYERS, IN))}
    final, _ = after_steps(plan, ours, PRILoRAPruning(fraction=0.0), norms, [40])
    chex.assert_trees_all_equal(nodes(final)[PATH].train, node.train)


def norms_of(model, params, adapters, tokens, segments):
    return model.collect(params, adapters, tokens, ["inputs"], segment_ids=segments)[1].inputs


def test_input_norms_leave_padding_out():
    x = jax.random.normal(jax.random.key(2), (3, 5, IN))
    mask = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    dirty = jnp.where((mask == 0)[:, :, None], jnp.nan, x)
    want = np.sqrt(np.square(np.asarray(x, np.float64)[np.asarray(mask) == 1]).sum(axis=0))
    np.testing.assert_allclose(feature_norms(dirty, mask), want, rtol=1e-5)
    np.testing.assert_allclose(feature_norms(x), np.linalg.norm(np.asarray(x).reshape(-1, IN), axis=0), rtol=1e-5)
    assert feature_norms(x.astype(jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_allclose(ema(jnp.full(3, 2.0), jnp.full(3, 4.0), 0.9), np.full(3, 2.2), rtol=1e-6)


@pytest.mark.parametrize("group", ["per_rank", "matrix"])
@pytest.mark.parametrize("fraction", [0.5, 0.33])
def test_the_least_important_fraction_goes(group, fraction):
    a = jax.random.normal(jax.random.key(3), (IN, 4)) * jnp.asarray([0.1, 1.0, 3.0, 0.0])[None, :]
    norms = jnp.exp(jax.random.normal(jax.random.key(4), (IN,)))
    keep = np.asarray(kept(a, norms, jnp.int32(3), fraction, group))
    score = np.abs(np.asarray(a)) * np.asarray(norms)[:, None]
    if group == "per_rank":
        want = np.ones(a.shape, bool)
        for column in range(4):
            want[np.argsort(score[:, column], kind="stable")[: int(fraction * IN)], column] = False
    else:
        flat = np.ones(IN * 3, bool)
        flat[np.argsort(score[:, :3].reshape(-1), kind="stable")[: int(fraction * IN * 3)]] = False
        want = np.concatenate([flat.reshape(IN, 3), np.ones((IN, 1), bool)], axis=1)
    np.testing.assert_array_equal(keep, want)
    assert np.asarray(kept(a, jnp.zeros(IN), jnp.int32(3), fraction, group)).all()


@pytest.mark.parametrize("group", ["per_rank", "matrix"])
def test_pruning_is_due_every_so_often_and_exact_on_a_ragged_stack(group):
    method = sx.PRILoRA(rank=sx.LinearRanks(2, 6))
    plan, adapters = sx.plan(PARAMS, [("proj", method)]), attached(method)
    initial = nodes(adapters)[PATH]
    pruning = PRILoRAPruning(fraction=0.25, every=3, group=group)
    norms = jnp.exp(jax.random.normal(jax.random.key(4), (LAYERS, IN)))
    for number in (1, 2, 4):
        node = nodes(after_steps(plan, adapters, pruning, {PATH: norms}, [number])[0])[PATH]
        chex.assert_trees_all_equal(node.train, initial.train)
        np.testing.assert_allclose(node.frozen["norm"], 0.1 * norms, rtol=1e-5)
    node = nodes(after_steps(plan, adapters, pruning, {PATH: norms}, [3])[0])[PATH]
    chex.assert_trees_all_equal(node.train["b"], initial.train["b"])
    for layer, rank in enumerate((2, 4, 6)):
        a = np.asarray(node.train["a"][layer, :, :rank])
        if group == "per_rank":
            assert ((a == 0).sum(axis=0) == IN // 4).all()
        assert (a == 0).sum() == IN * rank // 4
        np.testing.assert_array_equal(a[a != 0], np.asarray(initial.train["a"])[layer, :, :rank][a != 0])
    second = nodes(after_steps(plan, adapters, pruning, {PATH: norms}, [3, 4])[0])[PATH]
    np.testing.assert_allclose(second.frozen["norm"], 0.19 * norms, rtol=1e-5)


def update(node, x):
    """One Adam step of a regression."""
    train, frozen = sx.split(node)

    def loss(train):
        full = sx.combine(train, frozen)
        apply = jax.vmap(lambda w, adapter: sx.linear(x, w, adapter))
        return jnp.mean(jnp.square(apply(WEIGHT, full) - 1.0))

    tx = optax.adam(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jax.grad(loss)(train), tx.init(train), train)
        return sx.combine(optax.apply_updates(train, updates), frozen)


@pytest.mark.parametrize("persistent", [False, True])
def test_pruned_entries_grow_again_unless_masked(persistent):
    method = sx.PRILoRA(rank=4, persistent_mask=persistent)
    plan, adapters = sx.plan(PARAMS, [("proj", method)]), attached(method)
    x = jax.random.normal(jax.random.key(5), (7, IN))
    norms = {PATH: jnp.broadcast_to(feature_norms(x)[None], (LAYERS, IN))}
    node = nodes(adapters)[PATH]
    node = dataclasses.replace(node, train={**node.train, "b": jax.random.normal(jax.random.key(6), (LAYERS, 4, OUT))})
    final, state = after_steps(plan, {"layers": {"proj": {"kernel": node}}}, PRILoRAPruning(), norms, [40])
    pruned = nodes(final)[PATH]
    zeros = np.asarray(pruned.train["a"]) == 0
    assert zeros.sum() == LAYERS * 4 * IN // 2
    grown = update(pruned, x)
    single = jax.tree.map(lambda leaf: leaf[0], grown)
    effective = np.asarray(single.method.factors(single, (IN, OUT))[0])
    assert (effective[~zeros[0]] != 0).all()
    assert (effective[zeros[0]] == 0).all() if persistent else (effective[zeros[0]] != 0).all()
    y = sx.linear(x, WEIGHT[0], single)
    chex.assert_trees_all_close(y, x @ single.method.merge(WEIGHT[0], single), atol=2e-5 * float(jnp.abs(y).max()))
    if persistent:
        np.testing.assert_array_equal(np.asarray(pruned.frozen["mask"]) == 0, zeros)
        tuned = dataclasses.replace(grown, train={**grown.train, "a": grown.train["a"] + 9.0 * zeros})
        later, _ = after_steps(plan, {"layers": {"proj": {"kernel": tuned}}}, PRILoRAPruning(), norms, [80], state)
        np.testing.assert_array_equal(nodes(later)[PATH].train["a"] == 0, zeros)


def a_model(scan=True, remat="none"):
    """A random LLaMA of two layers with PRILoRA on every projection."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=(1,),
    )
    module = Llama(config, jnp.dtype("float32"), remat, scan)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    assert set(variables) == {"params"}
    params = variables["params"]
    _, adapters = sx.attach(jax.random.key(1), params, [("proj", sx.PRILoRA(rank=2))])
    return LanguageModel(module, params, config, None), adapters


@pytest.mark.parametrize("remat", nightly_unless([], ["none", "full"]))
def test_a_step_sees_the_norms_of_its_own_forward_pass(remat):
    """Of all microbatches together, padding left out; and the step itself is the same bits as without."""
    model, adapters = a_model(remat=remat)
    parts = take_apart(model.params, adapters)
    rng = np.random.default_rng(0)
    shape = (1, 4, 6)
    batch = {name: rng.integers(2, 32, shape).astype(np.int32) for name in ("tokens", "targets")}
    batch |= {"segments": np.ones(shape, np.int32), "counts": np.ones(shape, bool)}
    batch["segments"][:, 1:3, 4:] = 0
    batch["counts"] &= batch["segments"] > 0
    plan = sx.plan(model.params, [("proj", sx.PRILoRA(rank=2))])
    procedure = PRILoRAPruning(beta=0.0)
    procedure.check(Run(plan, 90, 1), {})
    ends = []
    for observe in (True, False):
        watch = procedure.watch(Run(plan, 9, 1)) if observe else optax.identity()
        tx = optax.chain(watch, optax.adam(1e-2))
        step = make_step(model, tx, jax.random.key(1), observe=observe)
        for accumulate in (1, 2):
            split_up = {name: array.reshape(accumulate, -1, 6) for name, array in batch.items()}
            ends.append(step(start(parts, tx), parts.frozen, parts.base, split_up)[0])
    chex.assert_trees_all_equal(ends[0].train, ends[2].train)
    segments = jnp.asarray(batch["segments"][0])
    want = norms_of(model, model.params, adapters, jnp.asarray(batch["tokens"][0]), segments)
    for end in ends[:2]:
        chex.assert_trees_all_close(end.opt[0].norms, want, rtol=1e-5)


def test_norms_have_no_gradient_even_where_they_are_zero():
    slope = jax.grad(lambda x: jnp.sum(feature_norms(x)))(jnp.zeros((3, IN)))
    np.testing.assert_array_equal(slope, 0)


def test_mistakes_are_told():
    for rules, message in (
        ([("proj", sx.LoRA(rank=2))], "no rule gives PRILoRA"),
        ([("proj", sx.scale(sx.PRILoRA(rank=2), 0.5))], "not inside a composition"),
        ([("proj", sx.scale(sx.add(sx.LoRA(rank=2), sx.PRILoRA(rank=2)), 0.5))], "not inside a composition"),
    ):
        run = Run(sx.plan(PARAMS, rules), 90, 1)
        with pytest.raises(sx.SboraxError, match=message):
            PRILoRAPruning().check(run, {})
    head = Run(sx.plan({"lm_head": {"kernel": WEIGHT[0]}}, [("head", sx.PRILoRA(rank=2))]), 90, 1)
    with pytest.raises(sx.SboraxError, match="those of the layers alone"):
        PRILoRAPruning().check(head, {})
    for wrong in ({"fraction": 1.0}, {"beta": -0.1}, {"every": 0}):
        with pytest.raises(sx.SboraxError):
            PRILoRAPruning(**wrong)


@pytest.mark.nightly
@pytest.mark.parametrize("scan", nightly_unless([True], [True, False]), ids=["scanned", "unrolled"])
def test_norms_of_a_models_own_inputs(scan):
    model, adapters = a_model(scan)
    params = model.params
    tokens = jax.random.randint(jax.random.key(3), (2, 6), 2, 32, jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], jnp.int32)
    norms = jax.jit(lambda tokens: norms_of(model, params, adapters, tokens, segments))(tokens)
    plan = sx.plan(params, [("proj", sx.PRILoRA(rank=2))])
    final, _ = after_steps(plan, adapters, PRILoRAPruning(beta=0.0), norms, [1])
    chex.assert_trees_all_equal({path: node.frozen["norm"] for path, node in nodes(final).items()}, norms)
    # By hand: what enters the first layer's attention is the embedding, normed.
    x = np.asarray(params["embed_tokens"]["embedding"], np.float64)[np.asarray(tokens)]
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5)
    want = np.sqrt(np.square(x[np.asarray(segments) > 0]).sum(axis=0))
    for name in ("q_proj", "k_proj", "v_proj"):
        norm = norms[f"layers/self_attn/{name}/kernel"][0] if scan else norms[f"layers/0/self_attn/{name}/kernel"]
        np.testing.assert_allclose(norm, want, rtol=1e-4)
    second = norms_of(model, params, adapters, tokens.at[0, 4:].set(3), segments)
    chex.assert_trees_all_close(second, norms, rtol=1e-5)
    assert len(norms) == (7 if scan else 14)


@pytest.mark.nightly
def test_pruning_goes_with_routers_of_other_kernels(tmp_path):
    """One forward pass gives both the norms of inputs and what routers add to the loss."""
    write_model(tmp_path / "model")
    experiment = sx.Experiment(
        str(tmp_path / "model"),
        sx.Data(str(write_data(tmp_path / "data.jsonl")), template="{instruction} ", answer="{output}", max_length=64),
        [("self_attn/(q|v)_proj", sx.MiLoRA(rank=2)), ("mlp", sx.PRILoRA(rank=4, persistent_mask=True))],
        sx.Optimizer(lr=1e-2),
        steps=3,
        batch_size=2,
        procedure=PRILoRAPruning(every=2, fraction=0.5),
    )
    train(experiment, tmp_path / "run", echo=lambda _: None)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all("balance_loss" in line for line in lines)
    trained = nodes(read_adapter(tmp_path / "run" / "adapter").adapters)
    pruned = [node for path, node in trained.items() if "mlp" in path]
    assert len(pruned) == 3
    for node in pruned:
        assert (np.asarray(node.frozen["norm"]) > 0).any()
        assert (np.asarray(node.frozen["mask"]) == 0).mean() > 0.2
