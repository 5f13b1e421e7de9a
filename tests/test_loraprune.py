"""LoRAPrune: the authors' scores, masks and schedule; a sliced model equals the masked one."""

import dataclasses
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from nightly import nightly_unless
from tiny_model import write_data, write_model

import sborax as sx
from sborax.adapters.core import SboraxError, linear, structure
from sborax.adapters.leaves import nest
from sborax.adapters.paths import Site
from sborax.adapters.tree import nodes
from sborax.cli import main
from sborax.interop.slim import slim
from sborax.methods.masked import Masked
from sborax.models import LlamaConfig, generate, load_model, save_hf
from sborax.models.nf4 import quantise
from sborax.procedures import Boundary, LoRAPrune, Run
from sborax.procedures.criteria import FullGradient, Magnitude, lora_change
from sborax.procedures.importance import BLOCKS, LoRAPruneState, group_scores, watch_importance
from sborax.procedures.in_place import find_state
from sborax.procedures.prune import masks_of, pruned
from sborax.train.loop import train

GOLDEN = np.load(Path(__file__).parent / "golden" / "loraprune.npz")
META = json.loads(str(GOLDEN["meta"]))
SIZES = {"self_attn": META["heads"], "mlp": META["ffn"]}
SIDES = {module: (block, side) for block, modules in BLOCKS.items() for module, side in modules.items()}


def flip(name):
    """A golden matrix as (in, out)."""
    return jnp.asarray(GOLDEN[name].T)


@pytest.mark.parametrize("module", SIDES)
@pytest.mark.parametrize("metric", ["lora", "magnitude", "grad"])
def test_scores_of_one_projection(module, metric):
    block, side = SIDES[module]
    with jax.enable_x64(True):
        for layer in (0, 1):
            name = f"L{layer}_{module}__"
            a, b = flip(name + "A"), flip(name + "B")
            change = {
                "lora": lora_change(a, b, flip(name + "gA0"), flip(name + "gB0")),
                "magnitude": jnp.ones(()),
                "grad": flip(name + "gW0"),
            }[metric]
            weight = flip(name + "W") + GOLDEN["scaling"] * a @ b
            change = jnp.broadcast_to(change, weight.shape)
            for normalise, suffix in ((True, ""), (False, "_raw")):
                got = group_scores(change, weight, side, SIZES[block], normalise=normalise)
                np.testing.assert_allclose(got, GOLDEN[f"{name}score_{metric}{suffix}"], rtol=1e-10)


def test_the_change_is_that_of_one_step_and_scores_ignore_the_size_of_the_loss():
    keys = jax.random.split(jax.random.key(0), 4)
    a, b, ga, gb = (jax.random.normal(key, shape) for key, shape in zip(keys, [(6, 2), (2, 5)] * 2, strict=True))
    np.testing.assert_allclose(lora_change(a, b, ga, gb), a @ b - (a - ga) @ (b - gb), rtol=0, atol=1e-5)
    with jax.enable_x64(True):
        change, weight = np.random.default_rng(0).normal(size=(2, 6, 4))
        small, large = (group_scores(jnp.asarray(f * change), jnp.asarray(weight), "out", 2) for f in (1.0, 1e3))
        np.testing.assert_allclose(small, large, rtol=1e-6)
        squared = group_scores(jnp.asarray(change), jnp.asarray(weight), "out", 2, power=2, normalise=False)
        np.testing.assert_allclose(squared, ((change * weight) ** 2).sum(0).reshape(2, 2).sum(1))


def golden_trees(step=0):
    """Layers 0 and 1 as a stack: sites, base, and adapters holding factors or gradients."""
    sites, base, train, frozen, grads = {}, {}, {}, {}, {}
    for module, (block, side) in SIDES.items():
        path = f"layers/{block}/{module}/kernel"

        def stacked(leaf, module=module):
            arrays = [GOLDEN[f"L{layer}_{module}__{leaf}"].T for layer in (0, 1)]
            return jnp.asarray(np.stack(arrays), jnp.float32)

        base[path] = stacked("W")
        method = structure(sx.LoRA(rank=3))
        sites[path] = Site(path, sx.LoRA(rank=3), (2,), base[path].shape[1:], 1, 0)
        leaves = {"a": stacked("A"), "b": stacked("B")}
        slopes = {"a": stacked(f"gA{step}"), "b": stacked(f"gB{step}")}
        constants = {"scale": jnp.full(2, GOLDEN["scaling"], jnp.float32)}
        if side == "out":
            method, leaves, slopes = Masked(method), {"part": leaves}, {"part": slopes}
            constants = {"part": constants, "mask": jnp.ones((2, base[path].shape[2]))}
        train[path] = sx.Adapter(leaves, {}, method)
        grads[path] = sx.Adapter(slopes, {}, method)
        frozen[path] = sx.Adapter({}, constants, method)
    return sites, base, nest(train), nest(frozen), nest(grads)


def test_running_scores_masks_and_masked_outputs(strict):
    sites, base, train, frozen, _ = golden_trees()
    groups = {"layers/self_attn": SIZES["self_attn"], "layers/mlp": SIZES["mlp"]}
    watch = watch_importance(sites, groups)
    update = jax.jit(watch.update)
    state = watch.init(train)
    for step in range(3):
        grads = golden_trees(step)[4]
        updates, state = update(grads, state, train, frozen=frozen, base=base)
        chex.assert_trees_all_equal(updates, grads)
        for layer in (0, 1):
            for block in SIZES:
                want = GOLDEN[f"L{layer}_{block}__ema{step}"]
                np.testing.assert_allclose(state.scores[f"layers/{block}"][layer], want, rtol=2e-5)
    masks = {parent: jnp.ones_like(leaf) for parent, leaf in state.scores.items()}
    for number, share in enumerate(GOLDEN["prune_ratios"]):
        masks = {parent: pruned(state.scores[parent], mask, float(share)) for parent, mask in masks.items()}
        for module, (block, side) in SIDES.items():
            for layer in (0, 1) if side == "out" else ():
                want = GOLDEN[f"L{layer}_{module}__mask_after{number}"]
                got = np.repeat(masks[f"layers/{block}"][layer], len(want) // SIZES[block])
                np.testing.assert_array_equal(got, want)
    for path, node in nodes(sx.combine(train, frozen)).items():
        _, block, module, _ = path.split("/")
        if SIDES[module][1] != "out":
            continue
        single = jax.tree.map(lambda leaf: leaf[1], node)
        mask = jnp.repeat(masks[f"layers/{block}"][1], single.frozen["mask"].size // SIZES[block])
        single = dataclasses.replace(single, frozen={**single.frozen, "mask": mask})
        got = linear(jnp.asarray(GOLDEN[f"L1_{module}__x2"], jnp.float32), base[path][1], single)
        np.testing.assert_allclose(got, GOLDEN[f"L1_{module}__y_masked"], rtol=0, atol=2e-5)
        merged = single.method.merge(base[path][1], single)
        live = np.asarray(mask) > 0
        want = GOLDEN[f"final_L1_{module}__W_merged_sliced"]
        np.testing.assert_allclose(np.asarray(merged)[:, live].T, want, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(np.asarray(merged)[:, ~live], 0)


def test_scores_by_magnitude():
    """A step with any gradients scores every block by the sum of its weights, as the authors' code does."""
    sites, base, train, frozen, grads = golden_trees()
    groups = {"layers/self_attn": SIZES["self_attn"], "layers/mlp": SIZES["mlp"]}
    watch = watch_importance(sites, groups, decay=0.0, criterion=Magnitude())
    _, state = watch.update(grads, watch.init(train), train, frozen=frozen, base=base)
    for block, modules in BLOCKS.items():
        for layer in (0, 1):
            want = sum(GOLDEN[f"L{layer}_{module}__score_magnitude"] for module in modules)
            np.testing.assert_allclose(state.scores[f"layers/{block}"][layer], want, rtol=2e-5)


def test_scores_by_the_full_gradient():
    sites, base, train, frozen, grads = golden_trees()
    groups = {"layers/self_attn": SIZES["self_attn"], "layers/mlp": SIZES["mlp"]}
    watch = watch_importance(sites, groups, decay=0.0, criterion=FullGradient())
    full = {}
    for path in base:
        _, _, module, _ = path.split("/")
        full[path] = jnp.asarray(np.stack([GOLDEN[f"L{layer}_{module}__gW0"].T for layer in (0, 1)]), jnp.float32)
    _, state = watch.update(grads, watch.init(train), train, frozen=frozen, base=base, base_grads=full)
    for block, modules in BLOCKS.items():
        for layer in (0, 1):
            want = sum(GOLDEN[f"L{layer}_{module}__score_grad"] for module in modules)
            np.testing.assert_allclose(state.scores[f"layers/{block}"][layer], want, rtol=2e-5)


def test_a_step_scores_by_the_gradient_of_the_merged_model(tiny):
    """Scores of a run's own step beside the gradient of the dense model that its adapters merge to."""
    experiment = sx.Experiment(
        model="unused",
        data=sx.Data("unused"),
        rules=[("self_attn|mlp", sx.LoRA(rank=2, alpha=4.0))],
        procedure=LoRAPrune(metric="grad", decay=0.0),
        optimizer=sx.Optimizer(lr=1e-2),
        batch_size=3,
        accumulate=2,
        steps=10,
    )
    prepared = sx.prepare(experiment, tiny, 10)
    params, adapters = prepared.attach(tiny.params)
    trained, frozen = sx.split(adapters)
    leaves, treedef = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    tuned = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    adapters = sx.combine(jax.tree.unflatten(treedef, tuned), frozen)
    tokens = jax.random.randint(jax.random.key(6), (2, 3, 17), 0, tiny.config.vocab_size)
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:]}
    batch |= {"counts": jnp.ones((2, 3, 16), bool), "segments": jnp.ones((2, 3, 16), jnp.int32)}

    def dense_loss(params):
        logits = tiny.apply(params, None, tokens[..., :-1].reshape(6, 16))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[..., 1:].reshape(6, 16)).mean()

    merged = sx.merge(params, adapters)
    full = jax.grad(dense_loss)(merged)["layers"]
    parts = prepared.take_apart(params, adapters)
    state, _ = prepared.make_step()(prepared.start(parts), parts.frozen, parts.base, batch)
    scores = find_state(state.opt, LoRAPruneState).scores
    for block, modules in BLOCKS.items():
        groups = tiny.config.num_key_value_heads if block == "self_attn" else tiny.config.intermediate_size
        want = np.zeros((tiny.config.num_hidden_layers, groups))
        for module, side in modules.items():
            taylor = full[block][module]["kernel"] * merged["layers"][block][module]["kernel"]
            channels = np.abs(np.asarray(taylor, np.float64)).sum(axis=2 if side == "in" else 1)
            sums = channels.reshape(len(want), groups, -1).sum(axis=2)
            want += sums / np.linalg.norm(sums, axis=1, keepdims=True)
        np.testing.assert_allclose(scores[f"layers/{block}"], want, rtol=1e-4)
    # Not what LoRA's gradients say.
    variant = dataclasses.replace(experiment, procedure=LoRAPrune(decay=0.0))
    lora = sx.prepare(variant, tiny, 10)
    parts = lora.take_apart(params, adapters)
    state, _ = lora.make_step()(lora.start(parts), parts.frozen, parts.base, batch)
    estimated = find_state(state.opt, LoRAPruneState).scores
    assert np.abs(estimated["layers/mlp"] - scores["layers/mlp"]).max() > 1e-2


def test_a_quantised_base_has_no_full_gradient(tiny):
    run = Run(sx.plan(tiny.params, [("self_attn|mlp", sx.LoRA(rank=1))]), 4, 2)
    base = {site.path: jnp.zeros((*site.stack, *site.shape)) for site in run.plan.sites}
    path = "layers/mlp/up_proj/kernel"
    base[path] = quantise(jnp.ones((2, 64, 4)))
    with pytest.raises(SboraxError, match=f"{path}: a quantised weight has no gradient; use a dense base"):
        LoRAPrune(metric="grad").check(run, base)
    LoRAPrune().check(run, base)


def test_a_random_order_is_drawn_at_every_pruning():
    """Every key prunes as many groups, and others; those that are pruned stay so."""
    sites, base, train, frozen, grads = golden_trees()
    procedure = LoRAPrune(metric="random", warmup=0.0, cooldown=0.5, every=1, protect=0.0)
    run = Run(sx.Plan(tuple(sites.values()), ()), 4, SIZES["self_attn"])
    watch = procedure.watch(run)
    _, opt = watch.update(grads, watch.init(train), train, frozen=frozen, base=base)
    assert not any(scores.any() for scores in opt.scores.values())
    start = Boundary(sx.combine(train, frozen), base, opt)
    early = procedure.apply(jax.random.key(9), 1, run, start)
    assert masks_of(early.opt)["layers/mlp"].sum() < 2 * SIZES["mlp"]
    ends = [masks_of(procedure.apply(jax.random.key(seed), 2, run, early).opt) for seed in range(4)]
    for end in ends:
        for parent, mask in masks_of(early.opt).items():
            assert (end[parent] <= mask).all()
            assert (mask.shape[1] - end[parent].sum(axis=1) == mask.shape[1] // 2).all()
    assert len({np.asarray(end["layers/mlp"]).tobytes() for end in ends}) == 4


def test_a_nan_changes_no_score():
    sites, base, train, frozen, grads = golden_trees()
    groups = {"layers/self_attn": SIZES["self_attn"], "layers/mlp": SIZES["mlp"]}
    watch = watch_importance(sites, groups)
    _, state = watch.update(grads, watch.init(train), train, frozen=frozen, base=base)
    path = "layers/self_attn/o_proj/kernel"
    bad = nodes(grads) | {path: jax.tree.map(lambda leaf: leaf * jnp.nan, nodes(grads)[path])}
    _, final = watch.update(nest(bad), state, train, frozen=frozen, base=base)
    chex.assert_trees_all_equal(final, state)


def test_schedule():
    procedure = LoRAPrune()
    for step, want in zip(GOLDEN["schedule_steps"], GOLDEN["schedule_ratio_1000_w0.1_c0.1_0_0.5"], strict=True):
        assert procedure.sparsity(int(step), 1000) == pytest.approx(float(want), abs=1e-12)
    run = Run(sx.Plan((), ()), 1000, 1)
    due = [step for step in range(1, 1001) if procedure.due(step, run)]
    assert due == list(range(110, 901, 10))
    for cooldown in (0.0, 0.5):
        short = LoRAPrune(cooldown=cooldown)
        assert any(short.due(step, Run(sx.Plan((), ()), 7, 1)) for step in range(1, 8))


@pytest.mark.parametrize(("depth", "protect"), [(3, 0.1), (9, 0.1), (10, 0.1), (21, 0.1), (32, 0.1), (10, 0.0)])
def test_protected_layers(depth, protect):
    site = Site("layers/mlp/gate_proj/kernel", sx.LoRA(rank=1), (depth,), (4, 4), 1, 0)
    run = Run(sx.Plan((site,), ()), 10, 1)
    spared = LoRAPrune(protect=protect)._spared("layers/mlp", run)
    want = ~GOLDEN[f"freeze_prunable_L{depth}"] if protect else np.zeros(depth, bool)
    np.testing.assert_array_equal(np.asarray(spared)[:, 0], want)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of two layers, four heads and two key-value heads."""
    return load_model(str(write_model(tmp_path_factory.mktemp("tiny"))), "float32")


def trained(model, procedure, steps=6, rules=(("self_attn|mlp", sx.LoRA(rank=2, alpha=4.0)),)):
    """A few steps by hand, with everything a procedure asks for."""
    plan = sx.plan(model.params, rules)
    run = Run(plan, steps, model.config.num_key_value_heads)
    params, adapters = sx.attach(jax.random.key(0), model.params, plan)
    base = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    procedure.check(run, base)
    boundary = procedure.start(jax.random.key(1), run, Boundary(adapters, base))
    tx = optax.chain(procedure.watch(run), optax.adam(3e-2))
    train, frozen = sx.split(boundary.adapters)
    opt = tx.init(train)
    tokens = jax.random.randint(jax.random.key(2), (2, 16), 0, model.config.vocab_size)

    @jax.jit
    def step(train, frozen, opt):
        def loss(train):
            logits = model.apply(params, sx.combine(train, frozen), tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(train)
        updates, opt = tx.update(grads, opt, train, frozen=frozen, base=base)
        return optax.apply_updates(train, updates), opt, value

    values, history = [], []
    for number in range(1, steps + 1):
        train, opt, value = step(train, frozen, opt)
        values.append(float(value))
        if procedure.due(number, run):
            boundary = Boundary(sx.combine(train, frozen), base, opt)
            boundary = procedure.apply(jax.random.key(number), number, run, boundary)
            opt, (train, frozen) = boundary.opt, sx.split(boundary.adapters)
            history.append({parent: np.asarray(leaf) for parent, leaf in masks_of(opt).items()})
    return sx.combine(train, frozen), values, history, tokens, boundary, run


@pytest.mark.nightly
def test_a_sliced_model_is_the_masked_one_and_transformers_loads_it(tiny, tmp_path):
    procedure = LoRAPrune(ratio=0.5, warmup=0.0, cooldown=0.3, every=1, protect=0.0)
    adapters, values, history, tokens, boundary, run = trained(tiny, procedure)
    assert values[-1] < values[0]
    for old, new in zip(history, history[1:], strict=False):
        assert all((new[parent] <= old[parent]).all() for parent in new)
    assert {parent: leaf.sum(axis=1).tolist() for parent, leaf in history[-1].items()} == {
        "layers/self_attn": [1, 1],
        "layers/mlp": [24, 24],
    }
    # Masks come back from the optimiser's state alone.
    plain = procedure.start(
        jax.random.key(1), run, Boundary(sx.attach(jax.random.key(0), tiny.params, run.plan)[1], {})
    )
    replay = procedure.replay(jax.random.key, 6, run, dataclasses.replace(plain, opt=boundary.opt), lambda step: {})
    got, want = sx.split(replay.adapters)[1], sx.split(adapters)[1]
    chex.assert_trees_all_equal(got, want)

    masked = tiny.apply(tiny.params, adapters, tokens)
    small = slim(tiny, tiny.params, adapters)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (2, 1)
    assert small.config.intermediate_size == 24
    size = lambda params: sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))  # noqa: E731
    assert size(small.params) < 0.6 * size(tiny.params)
    np.testing.assert_allclose(small.apply(small.params, None, tokens), masked, rtol=0, atol=2e-5)
    assert np.abs(masked - tiny.apply(sx.merge(tiny.params, unmasked(adapters)), None, tokens)).max() > 1e-2

    save_hf(tmp_path / "small", small, small.params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        logits = theirs(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits, masked, rtol=0, atol=5e-5)
    back = load_model(str(tmp_path / "small"), "float32")
    np.testing.assert_allclose(back.apply(back.params, None, tokens), masked, rtol=0, atol=2e-5)


def unmasked(adapters):
    """The same adapters with every mask at one."""
    return nest(
        {
            path: dataclasses.replace(node, frozen={**node.frozen, "mask": jnp.ones_like(node.frozen["mask"])})
            if "mask" in node.frozen
            else node
            for path, node in nodes(adapters).items()
        }
    )


def test_nothing_pruned_is_plain_lora(tiny):
    adapters, values, *_ = trained(tiny, LoRAPrune(ratio=0.0))
    _, plan_values = plain_lora(tiny)
    np.testing.assert_allclose(values, plan_values, rtol=1e-6)
    with pytest.raises(SboraxError, match="nothing is masked"):
        slim(tiny, tiny.params, sx.attach(jax.random.key(0), tiny.params, [("mlp", sx.LoRA(rank=1))])[1])


def plain_lora(model, steps=6):
    params, adapters = sx.attach(jax.random.key(0), model.params, [("self_attn|mlp", sx.LoRA(rank=2, alpha=4.0))])
    train, frozen = sx.split(adapters)
    tx = optax.adam(3e-2)
    opt, values = tx.init(train), []
    tokens = jax.random.randint(jax.random.key(2), (2, 16), 0, model.config.vocab_size)

    @jax.jit
    def step(train, opt):
        def loss(train):
            logits = model.apply(params, sx.combine(train, frozen), tokens)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(train)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(train, updates), opt, value

    for _ in range(steps):
        train, opt, value = step(train, opt)
        values.append(float(value))
    return train, values


def test_mistakes_are_told(tiny):
    with pytest.raises(SboraxError, match="initial <= ratio"):
        LoRAPrune(ratio=1.0)
    with pytest.raises(SboraxError, match="all seven"):
        trained(tiny, LoRAPrune(), rules=[("self_attn", sx.LoRA(rank=1))])
    with pytest.raises(SboraxError, match="and Bone makes others"):
        trained(tiny, LoRAPrune(), rules=[("mlp", sx.Bone(rank=1)), ("self_attn", sx.LoRA(rank=1))])


@pytest.mark.nightly
def test_layers_of_unequal_size(tiny, tmp_path):
    """The last layer is spared: the smaller model is unrolled, says so in its config, loads, runs and writes text."""
    adapters, _, _, tokens, *_ = trained(tiny, LoRAPrune(ratio=0.5, warmup=0.0, cooldown=0.3, every=1, protect=0.4))
    masked = tiny.apply(tiny.params, adapters, tokens)
    small = slim(tiny, tiny.params, adapters)
    assert small.config.layer_sizes == ((2, 1, 24), (4, 2, 48))
    np.testing.assert_allclose(small.apply(small.params, None, tokens), masked, rtol=0, atol=2e-5)
    save_hf(tmp_path / "small", small, small.params)
    back = load_model(str(tmp_path / "small"), "float32")
    assert back.config == small.config
    chex.assert_trees_all_equal(back.params, small.params)
    # Over a cache of keys and values, which differ in number.
    prompts = [np.asarray(row)[:length].tolist() for row, length in zip(tokens, (5, 9), strict=True)]
    ours = generate(back, back.params, None, prompts, 4, eos=())
    want = generate(tiny, sx.merge(tiny.params, adapters), None, prompts, 4, eos=())
    assert ours == want
    # A new adapter trains on it like on any other model.
    _, fresh = sx.attach(jax.random.key(0), back.params, [("mlp", sx.LoRA(rank=2))])
    np.testing.assert_array_equal(back.apply(back.params, fresh, tokens), back.apply(back.params, None, tokens))
    with pytest.raises(ValueError, match="sborax_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with pytest.raises(SboraxError, match="layers of unequal size cannot be pruned again"):
        trained(back, LoRAPrune())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_sizes": [[2, 1, 24]]}, "1 entries for 2 layers"),
        ({"layer_sizes": [[2, 1, 24], [3, 2, 48]]}, "must be a multiple"),
        ({"layer_sizes": [[2, 1, 24], [4, 2]]}, "must list"),
        ({"model_type": "llama"}, "go together"),
        ({"layer_sizes": []}, "go together"),
    ],
    ids=str,
)
def test_sizes_of_layers_that_make_no_sense(tiny, change, message):
    sizes = ((2, 1, 24), (4, 2, 48))
    raw = dataclasses.replace(tiny.config, layer_sizes=sizes, model_type="sborax_llama").to_hf()
    assert LlamaConfig.from_hf(raw).layer_sizes == sizes
    with pytest.raises(SboraxError, match=message):
        LlamaConfig.from_hf(raw | change)


@pytest.mark.parametrize("protect", nightly_unless([], [0.0, 0.4]))
def test_a_run_is_written_as_a_smaller_model(protect, tmp_path, capsys):
    data = sx.Data(
        str(write_data(tmp_path / "data.jsonl")), template="{instruction}", answer=" {output}", max_length=32
    )
    experiment = sx.Experiment(
        model=str(write_model(tmp_path / "model")),
        data=data,
        rules=[("self_attn|mlp", sx.LoRA(rank=2))],
        optimizer=sx.Optimizer(lr=1e-2),
        procedure=LoRAPrune(warmup=0.0, cooldown=0.3, every=1, protect=protect),
        steps=5,
        eval=sx.Eval(data=dataclasses.replace(data, limit=7)),
    )
    summary = train(experiment, tmp_path / "run", echo=lambda _: None)
    capsys.readouterr()
    assert main(["slim", str(tmp_path / "run"), str(tmp_path / "small")]) == 0
    output = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    sizes = [int(size.replace(",", "")) for size in re.findall(r"([\d,]+) parameters", output)]
    assert losses[1] == pytest.approx(summary.eval_loss, abs=1e-4) and losses[2] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0] != losses[1] and sizes[0] == sizes[1] > sizes[2]
    perplexities = [float(value) for value in re.findall(r": ([\d.]+) \(loss", output)]
    np.testing.assert_allclose(perplexities, np.exp(losses), rtol=1e-4)
    assert ("transformers cannot load it" in output) == (protect > 0)
    back = load_model(tmp_path / "small")
    assert sum(leaf.size for leaf in jax.tree.leaves(back.params)) == sizes[2]
    if not protect:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert main(["slim", str(tmp_path / "model"), str(tmp_path / "other")]) == 2
