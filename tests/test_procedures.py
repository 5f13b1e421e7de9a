"""Chains and boosters: continuous at the seams, of bounded rank, exact when resumed; and inside whole runs."""

import contextlib
import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PROCEDURES
from nightly import nightly_unless
from tiny_model import WIDE, write_data, write_model

import sborax as sx
from sborax.adapters.core import SboraxError, linear
from sborax.adapters.leaves import nest
from sborax.adapters.tree import nodes
from sborax.config.codec import decode, encode
from sborax.models import load_model
from sborax.models.language_model import LanguageModel, abstract, decoder_of
from sborax.models.nf4 import quantise
from sborax.procedures import (
    COLA,
    AbstractInPlace,
    AbstractProcedure,
    AbstractSegmented,
    AdaLoRABudget,
    Boundary,
    LoRAPrune,
    PRILoRAPruning,
    Run,
    XGBLoRA,
)
from sborax.procedures.segment import fold, fresh
from sborax.records.adapter import LEAVES, load_adapter, read_adapter
from sborax.train.active import restarted
from sborax.train.loop import train
from sborax.train.prepare import prepare

PATH = "layers/p/kernel"
LAYERS, IN, OUT = 4, 64, 12
KERNEL = 0.3 * jax.random.normal(jax.random.key(0), (LAYERS, IN, OUT))
INPUT = jax.random.normal(jax.random.key(1), (LAYERS, 20, IN))
TARGET = jax.random.normal(jax.random.key(2), (LAYERS, 20, OUT))
TX = optax.adam(optax.linear_schedule(2e-2, 1e-3, 12))
SEGMENTED = [COLA(every=3), COLA(every=4, ranks=(2, 1)), XGBLoRA(every=3, layers=2), XGBLoRA(every=2)]
by_procedure = pytest.mark.parametrize("procedure", SEGMENTED, ids=str)


def outputs(base, adapters):
    """Every layer's own projection."""
    (node,) = nodes(adapters).values()
    return jax.vmap(linear)(INPUT, base[PATH], node)


@jax.jit
def one_step(trained, frozen, base, opt):
    def loss(trained):
        return jnp.mean((outputs(base, sx.combine(trained, frozen)) - TARGET) ** 2)

    value, grads = jax.value_and_grad(loss)(trained)
    updates, opt = TX.update(grads, opt, trained)
    return optax.apply_updates(trained, updates), opt, value


@dataclasses.dataclass
class Trail:
    """A run by hand and what it left behind."""

    run: Run
    boundary: Boundary
    values: list
    segments: dict
    seams: list


def go(procedure, steps=12, rank=2, kernel=KERNEL, rules=None):
    """A run with or without a procedure."""
    params = nest({PATH: kernel})
    plan = sx.plan(params, rules or [("p", sx.LoRA(rank=rank, alpha=3.0))])
    run = Run(plan, steps, 1)
    _, adapters = sx.attach(jax.random.key(3), params, plan)
    boundary = Boundary(adapters, {PATH: kernel})
    if procedure is not None:
        procedure.check(run, boundary.base)
        boundary = procedure.start(jax.random.key(0), run, boundary)
    trained, frozen = sx.split(boundary.adapters)
    base, opt, trail = boundary.base, TX.init(trained), Trail(run, boundary, [], {}, [])
    for step in range(1, steps + 1):
        trained, opt, value = one_step(trained, frozen, base, opt)
        trail.values.append(float(value))
        if procedure is not None and procedure.due(step, run):
            segment = sx.combine(trained, frozen)
            successor = procedure.apply(jax.random.key(step), step, run, Boundary(segment, base, opt))
            trail.seams.append((outputs(base, segment), outputs(successor.base, successor.adapters)))
            trail.segments[step], base = segment, successor.base
            trained, frozen = sx.split(successor.adapters)
            opt = restarted(TX, opt, trained)
    trail.boundary = Boundary(sx.combine(trained, frozen), base, opt)
    return trail


def joined(procedure, trail):
    return procedure.joined([*trail.segments.values(), trail.boundary.adapters], trail.run)


@by_procedure
def test_the_function_is_continuous_and_the_loss_falls(procedure):
    trail = go(procedure)
    assert len(trail.seams) == 12 // procedure.every - 1
    for start, end in trail.seams:
        np.testing.assert_allclose(end, start, rtol=0, atol=5e-6)
    assert trail.values[-1] < trail.values[0]
    (node,) = nodes(trail.boundary.adapters).values()
    assert np.abs(node.train["b"]).max() > 0


@pytest.mark.parametrize("procedure", [COLA(every=12), COLA(every=50), XGBLoRA(every=12, layers=LAYERS)], ids=str)
def test_one_segment_is_plain_lora(procedure):
    trail, plain = go(procedure), go(None)
    assert trail.values == plain.values
    chex.assert_trees_all_equal(trail.boundary.adapters, plain.boundary.adapters)
    assert trail.segments == {}


@pytest.mark.parametrize("procedure", [case for case in SEGMENTED if "ranks=(" not in str(case)], ids=str)
def test_rank_of_the_whole_change(procedure):
    rank = 1
    trail = go(procedure, rank=rank)
    merged = sx.merge(nest(trail.boundary.base), trail.boundary.adapters)
    change = np.asarray(merged["layers"]["p"]["kernel"] - KERNEL, np.float64)
    segments = [*trail.segments.values(), trail.boundary.adapters]
    # Which layers each segment had: all of them, or those whose a is not zero.
    draws = np.stack([np.any(np.asarray(nodes(segment)[PATH].train["a"]) != 0, axis=(1, 2)) for segment in segments])
    expected = LAYERS if isinstance(procedure, COLA) else procedure.layers or 2
    np.testing.assert_array_equal(draws.sum(axis=1), expected)
    for layer in range(LAYERS):
        values = np.linalg.svd(change[layer], compute_uv=False)
        total = rank * draws[:, layer].sum()
        assert np.all(values[total:] < 1e-5)
        assert total == 0 or values[total - 1] > 1e-4
    if not isinstance(procedure, COLA):
        assert len({tuple(row) for row in draws}) > 1

    # One plain LoRA of the summed rank on the untouched base says the same.
    lora = joined(procedure, trail)
    np.testing.assert_allclose(
        sx.merge(nest({PATH: KERNEL}), lora)["layers"]["p"]["kernel"],
        merged["layers"]["p"]["kernel"],
        rtol=0,
        atol=2e-6,
    )
    ranks = nodes(lora)[PATH].method.rank
    totals = np.maximum(rank * draws.sum(axis=0), 1)
    np.testing.assert_array_equal(np.broadcast_to(ranks, LAYERS), totals)


def test_a_rate_scales_every_merged_booster():
    procedure = XGBLoRA(every=4, layers=LAYERS, rate=0.5)
    trail = go(procedure)
    node = nodes(trail.segments[4])[PATH]
    first = 0.5 * node.frozen["scale"][:, None, None] * (node.train["a"] @ node.train["b"])
    second = nodes(trail.segments[8])[PATH]
    change = first + 0.5 * second.frozen["scale"][:, None, None] * (second.train["a"] @ second.train["b"])
    np.testing.assert_allclose(trail.boundary.base[PATH], KERNEL + change, rtol=0, atol=1e-6)
    merged = sx.merge(nest(trail.boundary.base), trail.boundary.adapters)
    expected = sx.merge(nest({PATH: KERNEL}), joined(procedure, trail))
    np.testing.assert_allclose(merged["layers"]["p"]["kernel"], expected["layers"]["p"]["kernel"], rtol=0, atol=2e-6)


def test_later_links_have_their_own_ranks():
    """A link of rank r is a run of rank r: the same numbers as with leaves of that width, and exact zeros beyond it."""
    procedure = COLA(every=4, ranks=(3, 1))
    trail = go(procedure, rank=3)
    segments = [nodes(part)[PATH] for part in (trail.segments[4], trail.segments[8], trail.boundary.adapters)]
    for node, rank in zip(segments, (3, 1, 1), strict=True):
        np.testing.assert_array_equal(np.any(node.train["a"] != 0, axis=1), [[True] * rank + [False] * (3 - rank)] * 4)
        np.testing.assert_array_equal(np.any(node.train["b"] != 0, axis=2), [[True] * rank + [False] * (3 - rank)] * 4)
        np.testing.assert_allclose(node.frozen["scale"], 3.0 / rank, rtol=1e-6)
    assert len({jax.tree.structure(node) for node in segments}) == 1

    # The second link by hand, on the base that the first one left, in leaves of width 1.
    first = fold({PATH: KERNEL}, trail.segments[4])
    plan = sx.plan(nest(first), [("p", sx.LoRA(rank=1, alpha=3.0))])
    trained, frozen = sx.split(sx.attach(jax.random.key(4), nest(first), plan)[1])
    opt = TX.init(trained)
    opt = (opt[0], opt[1]._replace(count=jnp.int32(4)))
    for step in range(5, 9):
        trained, opt, value = one_step(trained, frozen, first, opt)
        np.testing.assert_allclose(trail.values[step - 1], value, rtol=1e-6)
    thin = nodes(trained)[PATH]
    np.testing.assert_allclose(segments[1].train["a"][..., :1], thin.train["a"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(segments[1].train["b"][..., :1, :], thin.train["b"], rtol=0, atol=1e-6)

    # All links are one LoRA of rank 3 + 1 + 1 on the base before.
    lora = joined(procedure, trail)
    assert nodes(lora)[PATH].method.rank == 5
    merged = sx.merge(nest(trail.boundary.base), trail.boundary.adapters)
    np.testing.assert_allclose(kernel_of(sx.merge(nest({PATH: KERNEL}), lora)), kernel_of(merged), rtol=0, atol=2e-6)
    change = np.asarray(kernel_of(merged) - KERNEL, np.float64)
    assert (np.linalg.matrix_rank(change, tol=1e-5) == 5).all()


def test_ranks_that_do_not_go_down_change_nothing():
    plain, equal = go(COLA(every=4), rank=2), go(COLA(every=4, ranks=(2, 2)), rank=2)
    assert plain.values == equal.values
    chex.assert_trees_all_equal(plain.boundary.adapters, equal.boundary.adapters)


def test_ranks_by_layer_of_a_stack():
    rules = [sx.Rule("p", sx.LoRA(rank=2), layers=(0,)), sx.Rule("p", sx.SARA(rank=2, lam_init="ones"), layers=(2, 3))]
    procedure = COLA(every=4, ranks=(2, 1))
    trail = go(procedure, rules=rules)
    for start, end in trail.seams:
        np.testing.assert_allclose(end, start, rtol=0, atol=5e-6)
    assert nodes(joined(procedure, trail))[PATH].method.parts[0].rank == (4, 1, 4, 4)


def test_ranks_of_kernels_without_a_stack():
    """Layers by number, as in a model of unequal layers, have the links of a stack, and so do tables their own."""
    procedure, links = COLA(every=4, ranks=(2, 1)), []
    numbered = {f"layers/{layer}/p/kernel": kernel for layer, kernel in enumerate(KERNEL)}
    for base in ({PATH: KERNEL}, numbered):
        run = Run(sx.plan(nest(base), [("p", sx.LoRA(rank=2))]), 8, 1)
        adapters = sx.attach(jax.random.key(3), nest(base), run.plan)[1]
        links.append(nodes(procedure.apply(jax.random.key(1), 4, run, Boundary(adapters, base)).adapters))
    for layer in range(LAYERS):
        stacked, alone = links[0][PATH], links[1][f"layers/{layer}/p/kernel"]
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, layer=layer: leaf[layer], (stacked.train, stacked.frozen)),
            (alone.train, alone.frozen),
        )


@pytest.mark.parametrize(
    ("procedure", "method", "message"),
    [
        (COLA(every=2, ranks=(2, 1)), sx.SBoRA(rank=2), "SBoRA has no rank that ranks= could lower; use LoRA"),
        (COLA(every=2, ranks=(2, 1)), sx.IA3(), "IA3 is no plain product"),
        (COLA(every=2, ranks=(4, 2)), sx.LoRA(rank=2), "the rank of the rules, 2, and ranks begins with 4"),
        (COLA(every=2, ranks=(3, 2, 1)), sx.LoRA(rank=3), "ranks names 3 links, but .* a run of 4 steps has 2"),
    ],
)
def test_ranks_that_cannot_be(procedure, method, message):
    run = Run(sx.plan(nest({PATH: KERNEL}), [("p", method)]), 4, 1)
    with pytest.raises(SboraxError, match=message) as error:
        procedure.check(run, {PATH: KERNEL})
    assert "\n" not in str(error.value)


@by_procedure
def test_replay_gives_the_same_bits(procedure):
    trail = go(procedure)
    params = nest({PATH: KERNEL})
    begun = procedure.start(
        jax.random.key(0), trail.run, Boundary(sx.attach(jax.random.key(3), params, trail.run.plan)[1], {PATH: KERNEL})
    )
    second = procedure.replay(jax.random.key, 12, trail.run, begun, trail.segments.__getitem__)
    np.testing.assert_array_equal(second.base[PATH], trail.boundary.base[PATH])
    frozen, expected = sx.split(second.adapters)[1], sx.split(trail.boundary.adapters)[1]
    chex.assert_trees_all_equal(frozen, expected)
    # Only what lies before the step is done again.
    early = procedure.replay(jax.random.key, procedure.every - 1, trail.run, begun, {}.__getitem__)
    np.testing.assert_array_equal(early.base[PATH], KERNEL)


def test_small_segments_survive_a_bfloat16_base():
    kernel = KERNEL.astype(jnp.bfloat16)
    procedure = COLA(every=1)
    plan = sx.plan(nest({PATH: kernel}), [("p", sx.LoRA(rank=1))])
    run = Run(plan, 10, 1)
    _, adapters = sx.attach(jax.random.key(3), nest({PATH: kernel}), plan)
    node = nodes(adapters)[PATH]
    tiny = dataclasses.replace(node, train={**node.train, "b": jnp.full_like(node.train["b"], 1e-4)})
    boundary = procedure.start(jax.random.key(0), run, Boundary(adapters, {PATH: kernel}))
    for step in range(1, 4):
        boundary = procedure.apply(
            jax.random.key(step), step, run, dataclasses.replace(boundary, adapters=nest({PATH: tiny}))
        )
    change = boundary.base[PATH] - kernel.astype(jnp.float32)
    np.testing.assert_allclose(change, 3e-4 * jnp.broadcast_to(node.train["a"], change.shape), rtol=0, atol=2e-7)
    assert boundary.base[PATH].dtype == jnp.float32


def test_a_quantised_base_is_refused_unless_asked_for():
    kernel = quantise(KERNEL)
    with pytest.raises(SboraxError, match="errors add up.*requantise=True"):
        go(COLA(every=3), kernel=kernel)
    trail = go(COLA(every=6, requantise=True), kernel=kernel)
    assert isinstance(trail.boundary.base[PATH], type(kernel))
    ((start, end),) = trail.seams
    size = np.abs(start - outputs({PATH: kernel}, sx.scale(trail.segments[6], 0.0))).mean()
    assert 0 < np.abs(end - start).mean() < size


BY_LAYER = [sx.Rule("p", sx.LoRA(rank=2), layers=(0,)), sx.Rule("p", sx.SBoRA(rank=3), layers=(2, 3))]


def test_a_chain_on_rules_for_some_layers_leaves_the_others_alone():
    procedure, quantised = COLA(every=3), COLA(every=3, requantise=True)
    trail = go(procedure, rules=BY_LAYER)
    for start, end in trail.seams:
        np.testing.assert_allclose(end, start, rtol=0, atol=5e-6)
    lora = joined(procedure, trail)
    np.testing.assert_allclose(
        outputs({PATH: KERNEL}, lora), outputs(trail.boundary.base, trail.boundary.adapters), rtol=0, atol=2e-5
    )
    merged = sx.merge(nest({PATH: KERNEL}), lora)
    for base in (trail.boundary.base[PATH], kernel_of(merged)):
        matches = [np.array_equal(new, old) for new, old in zip(base, KERNEL, strict=True)]
        assert matches == [False, True, False, False]
    kernel = quantise(jax.random.normal(jax.random.key(4), (LAYERS, 64, OUT)))
    base = {PATH: kernel}
    run = Run(sx.plan(nest(base), BY_LAYER), 4, 1)
    quantised.check(run, base)
    (node,) = nodes(sx.attach(jax.random.key(3), nest(base), run.plan)[1]).values()
    tuned = sx.Adapter(jax.tree.map(lambda leaf: leaf + 0.5, node.train), node.frozen, node.method)
    end = quantised.apply(jax.random.key(1), 3, run, Boundary(nest({PATH: tuned}), base)).base[PATH]
    matches = [np.array_equal(new, old) for new, old in zip(end.absmax, kernel.absmax, strict=True)]
    assert matches == [False, True, False, False]


def kernel_of(params):
    (leaf,) = jax.tree.leaves(params)
    return leaf


def test_penalty_is_the_gradient_of_the_norms():
    tree = {"adapters": {"x": {"a": jnp.ones((3, 2)), "b": jnp.full((2, 4), 2.0)}}, "base": {"norm/scale": jnp.ones(3)}}
    zero = jax.tree.map(jnp.zeros_like, tree)
    got = XGBLoRA(penalty=0.1).regularise(zero, tree)
    want = {"adapters": {"x": {"a": jnp.full((3, 2), 0.1), "b": jnp.full((2, 4), 0.2)}}, "base": zero["base"]}
    chex.assert_trees_all_close(got, want, rtol=1e-6)


def test_a_restart_keeps_the_clock_of_the_learning_rate_alone():
    params = {"w": jnp.ones(3)}
    state = TX.init(params)
    for _ in range(5):
        _, state = TX.update({"w": jnp.ones(3)}, state, params)
    adam, clock = restarted(TX, state, params)
    assert int(adam.count) == 0 and int(clock.count) == 5
    np.testing.assert_array_equal(adam.mu["w"], 0)
    injected = optax.inject_hyperparams(optax.adamw)(learning_rate=optax.linear_schedule(1.0, 0.0, 10))
    state = injected.init(params)
    for _ in range(5):
        _, state = injected.update({"w": jnp.ones(3)}, state, params)
    again = restarted(injected, state, params)
    assert int(again.count) == 5 and int(again.inner_state[0].count) == 0
    # The sixth step of ten, on the first moments of a new start.
    update, _ = injected.update({"w": jnp.ones(3)}, again, params)
    np.testing.assert_allclose(update["w"], -0.5, rtol=1e-3)


def test_mistakes_are_told():
    for method, message in ((sx.PiSSA(rank=2), "rewrites the base"), (sx.DoRA(rank=2), "no plain product")):
        run = Run(sx.plan(nest({PATH: KERNEL}), [("p", method)]), 4, 1)
        with pytest.raises(SboraxError, match=message):
            COLA(every=1).check(run, {PATH: KERNEL})
    run = Run(sx.plan(nest({PATH: KERNEL}), [("p", sx.SBoRA(rank=2))]), 4, 1)
    COLA(every=1).check(run, {PATH: KERNEL})
    with pytest.raises(SboraxError, match="no pair a, b"):
        XGBLoRA().check(run, {PATH: KERNEL})
    run = Run(sx.plan(nest({PATH: KERNEL}), [("p", sx.LoRA(rank=2))]), 4, 1)
    run = Run(sx.plan(nest({PATH: KERNEL}), [sx.Rule("p", sx.DoRA(rank=2), layers=(1,))]), 4, 1)
    with pytest.raises(SboraxError, match="DoRA is no plain product"):
        COLA(every=1).check(run, {PATH: KERNEL})
    run = Run(sx.plan(nest({PATH: KERNEL}), [sx.Rule("p", sx.LoRA(rank=2), layers=(1,))]), 4, 1)
    with pytest.raises(SboraxError, match="draws the layers itself; leave layers= out of LoRA's rule"):
        XGBLoRA().check(run, {PATH: KERNEL})
    run = Run(sx.plan(nest({PATH: KERNEL}), [("p", sx.LoRA(rank=2))]), 4, 1)
    with pytest.raises(SboraxError, match="only 4 layers"):
        XGBLoRA(layers=5).check(run, {PATH: KERNEL})
    table = {"embed_tokens": {"embedding": KERNEL[0]}} | nest({PATH: KERNEL})
    run = Run(sx.plan(table, [("p|embed_tokens", sx.LoRA(rank=1))]), 4, 1)
    with pytest.raises(SboraxError, match="embed_tokens/embedding: only weights of layers are drawn; leave it out"):
        XGBLoRA().check(run, {site.path: KERNEL for site in run.plan.sites})
    with pytest.raises(SboraxError, match="trained itself"):
        COLA(every=1).check(run, {})
    for ranks in ((), (2, 4), (2, 0)):
        with pytest.raises(SboraxError, match="at least 1 and never rise"):
            COLA(every=2, ranks=ranks)
    for broken in (lambda: COLA(every=0), lambda: XGBLoRA(every=0), lambda: XGBLoRA(penalty=-1.0)):
        with pytest.raises(SboraxError):
            broken()


@pytest.mark.parametrize(
    "procedure", [*SEGMENTED, LoRAPrune(protect=0.0), AdaLoRABudget(target=2), PRILoRAPruning(group="matrix")], ids=str
)
def test_configs_come_back(procedure):
    assert decode(AbstractProcedure, json.loads(json.dumps(encode(procedure)))) == procedure


@dataclasses.dataclass(frozen=True)
class Shrinking(AbstractInPlace):
    """Scales all trained leaves by `factor` after every step."""

    paper = "an example"
    factor: float = 0.5

    def check(self, run, base):
        pass

    def due(self, step, run):
        return True

    def apply(self, key, step, run, boundary):
        trained, frozen = sx.split(boundary.adapters)
        smaller = jax.tree.map(lambda leaf: leaf * self.factor, trained)
        return dataclasses.replace(boundary, adapters=sx.combine(smaller, frozen))


@dataclasses.dataclass(frozen=True)
class Bare(AbstractProcedure):
    """The same without either base."""

    paper = "an example"
    resets = False
    factor: float = 0.5

    def check(self, run, base):
        pass

    def due(self, step, run):
        return True

    def apply(self, key, step, run, boundary):
        return Shrinking(self.factor).apply(key, step, run, boundary)

    def replay(self, key_of, done, run, boundary, kept):
        return boundary

    def joined(self, segments, run):
        return segments[-1]


@dataclasses.dataclass(frozen=True)
class Halves(AbstractSegmented):
    """One merge, half-way."""

    paper = "an example"

    def check(self, run, base):
        pass

    def due(self, step, run):
        return 2 * step == run.steps

    def apply(self, key, step, run, boundary):
        base = fold(boundary.base, boundary.adapters)
        return dataclasses.replace(boundary, base=base, adapters=fresh(key, run, base))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    return str(write_model(place / "model")), str(write_data(place / "data.jsonl"))


def has_acted(procedure, adapters):
    """Whether the trained adapters show that their procedure did its work."""
    sites = nodes(adapters).values()
    if isinstance(procedure, AdaLoRABudget):
        count = sum(np.count_nonzero(node.train["e"]) for node in sites)
        return count == sum(node.train["e"][..., 0].size for node in sites) * procedure.target
    if isinstance(procedure, PRILoRAPruning):
        flags = [np.asarray(node.frozen["norm"]).max(axis=-1).min() > 0 for node in sites]
        masks = [np.asarray(node.frozen["mask"]) for node in sites if "mask" in node.frozen]
        return all(flags) and all((mask == 0).mean(axis=(1, 2)).min() >= 0.5 for mask in masks)
    return True


@pytest.mark.nightly
@pytest.mark.parametrize("name", nightly_unless(["LoRAPrune"], PROCEDURES))
def test_whole_runs_resume_to_the_same_bits(name, places, tmp_path):
    procedure, method = PROCEDURES[name]
    experiment = sx.Experiment(
        model=places[0],
        data=sx.Data(places[1], template="{instruction}", answer=" {output}", max_length=32, buckets=(32,)),
        rules=[("self_attn|mlp", method)],
        optimizer=sx.Optimizer(lr=1e-2),
        procedure=procedure,
        steps=7,
        save=sx.Save(every=1, keep=20),
    )
    summary = train(experiment, tmp_path / "run", echo=lambda _: None)
    assert summary.finished
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    # Cut right after something was done between steps 4 and 5, and in the middle of a segment.
    for checkpoint in (tmp_path / "cut" / "checkpoints").iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > 5:
            shutil.rmtree(checkpoint)
    if procedure.resets:
        assert sorted(item.name for item in (tmp_path / "run" / "segments").iterdir()) == [
            f"{n:08d}" for n in (2, 4, 6)
        ]
        shutil.rmtree(tmp_path / "cut" / "segments" / f"{6:08d}")
    lines = []
    train(experiment, tmp_path / "cut", resume=True, echo=lines.append)
    assert any("resuming after step 5" in line for line in lines)
    for file in (LEAVES, "plan.json"):
        assert (tmp_path / "cut" / "adapter" / file).read_bytes() == (tmp_path / "run" / "adapter" / file).read_bytes()

    model = load_model(places[0])
    params, adapters = load_adapter(tmp_path / "run" / "adapter", model.params)
    assert has_acted(procedure, adapters)
    assert np.isfinite(model.apply(params, adapters, jnp.zeros((1, 4), jnp.int32))).all()
    with pytest.raises(SboraxError, match="steps differs"):
        train(dataclasses.replace(experiment, steps=9), tmp_path / "run", resume=True, echo=lambda _: None)


@dataclasses.dataclass(frozen=True)
class BesideBase(sx.AbstractLoss):
    """A loss with the base as a reference."""

    def __call__(self, outputs):
        return -jnp.sum(outputs.log_probs() - outputs.base_log_probs()), jnp.int32(1)


@pytest.mark.parametrize("procedure", [None, COLA(every=2), XGBLoRA(every=2)], ids=str)
def test_a_base_that_is_merged_into_is_no_reference(procedure):
    """After the first knot it would be the trained model."""
    rules = [("up_proj", sx.LoRA(rank=1))]
    experiment = sx.Experiment("m", sx.Data("d"), rules, loss=BesideBase(), steps=4, procedure=procedure)
    prepared = prepare(experiment, LanguageModel(decoder_of(WIDE), abstract(WIDE), WIDE, None), 4)
    parts = jax.eval_shape(prepared.adapt, abstract(WIDE))
    state = jax.eval_shape(prepared.start, parts)
    batch = {name: jnp.ones((2, 4), jnp.int32) for name in ("tokens", "targets", "segments")}
    batch["counts"] = batch["tokens"] > 0
    step, evaluation = prepared.make_step(), prepared.make_evaluation()
    stacked = jax.tree.map(lambda leaf: leaf[None], batch)
    message = "up_proj/kernel: changes in this run, so that the base is no reference"
    for function, *arguments in (
        (step, state, parts.frozen, parts.base, stacked),
        (evaluation, state.train, parts.frozen, parts.base, batch),
    ):
        with contextlib.nullcontext() if procedure is None else pytest.raises(SboraxError, match=message):
            jax.eval_shape(function, *arguments)


def test_a_layer_that_was_not_drawn_is_not_dead(tmp_path):
    """In a model of unequal layers every layer has adapters of its own, and those of some are zero in a segment."""
    model = write_model(
        tmp_path / "model", layer_sizes=((2, 1, 24), (4, 2, 48)), model_type="sborax_llama", num_hidden_layers=2
    )
    file = str(write_data(tmp_path / "data.jsonl"))
    experiment = sx.Experiment(
        model=str(model),
        data=sx.Data(file, template="{instruction}", answer=" {output}", max_length=32, buckets=(32,)),
        rules=[("up_proj", sx.LoRA(rank=1))],
        procedure=XGBLoRA(every=2, layers=1),
        steps=1,
    )
    train(experiment, tmp_path / "run", echo=lambda _: None)
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(norm > 0 for norm in line["grad_norms"].values()) == [False, True]


@pytest.mark.parametrize("procedure", nightly_unless([], [Shrinking(0.9), Bare(0.9), Halves()]), ids=str)
def test_procedures_of_ones_own_resume_to_the_same_bits(procedure, places, tmp_path):
    data = sx.Data(places[1], template="{instruction}", answer=" {output}", max_length=32, buckets=(32,))
    rules, keep_all = [("self_attn", sx.LoRA(rank=2))], sx.Save(every=1, keep=9)
    experiment = sx.Experiment(places[0], data, rules, procedure=procedure, steps=4, save=keep_all)
    train(experiment, tmp_path / "run", echo=lambda _: None)
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for step in ("3", "4"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / step)
    train(experiment, tmp_path / "cut", resume=True, echo=lambda _: None)
    first, second = ((tmp_path / name / "adapter" / LEAVES).read_bytes() for name in ("run", "cut"))
    assert first == second
    ranks = {node.method.rank for node in nodes(read_adapter(tmp_path / "run" / "adapter").adapters).values()}
    assert ranks == {4 if procedure.resets else 2}
    train(dataclasses.replace(experiment, procedure=None), tmp_path / "plain", echo=lambda _: None)
    assert (tmp_path / "plain" / "adapter" / LEAVES).read_bytes() != first
