"""Training on a tiny model: the step's invariants, the run directory, and runs that are cut short."""

import collections
import dataclasses
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.layout.state import TrainState, put_together, selected, start, take_apart
from sborax.models import load_model
from sborax.records.adapter import LEAVES, load_adapter
from sborax.records.checkpoint import flat, open_checkpoints
from sborax.records.eval_losses import sample_losses
from sborax.train.loop import train
from sborax.train.optimizer import make_optimizer, schedule
from sborax.train.read import read_held_out
from sborax.train.step import check_alive, make_evaluation, make_loss, make_step, sums
from sborax.train.stepper import RunStepper
from tests.tiny_model import write_data, write_model

ROOT = Path(__file__).resolve().parents[1]
RULES = (sx.Rule("mlp", sx.LoRA(rank=4, dropout=0.1)), sx.Rule("self_attn/(q|v)", sx.SBoRA(rank=4)))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    return str(write_model(place / "model")), str(write_data(place / "data.jsonl"))


@pytest.fixture(scope="module")
def model(places):
    return load_model(places[0])


def an_experiment(places, **changes):
    data = sx.Data(places[1], template="{instruction}", answer=" {output}", max_length=32, buckets=(32,))
    settings = {
        "model": places[0],
        "data": data,
        "rules": RULES,
        "optimizer": sx.Optimizer(lr=1e-2, decay=0.01),
        "steps": 6,
        "batch_size": 4,
        "save": sx.Save(every=2),
    }
    return sx.Experiment(**(settings | changes))


def a_batch(accumulate, batch, length=16, seed=0):
    rng = np.random.default_rng(seed)
    shape = (accumulate, batch, length)
    segments = np.ones(shape, np.int32)
    segments[..., length - 3 :] = 0
    return {
        "tokens": rng.integers(0, 258, shape).astype(np.int32),
        "targets": rng.integers(0, 258, shape).astype(np.int32),
        # Very different numbers of tokens in each row, so that a mean of means would be off.
        "counts": (rng.random(shape) < rng.random((*shape[:2], 1))) & (segments > 0),
        "segments": segments,
    }


def quiet(_):
    """Says nothing."""


# The step


@pytest.fixture(scope="module")
def two_steps(model):
    """Two steps of a model with every kind of trained leaf."""
    params, adapters = sx.attach(jax.random.key(0), model.params, RULES)
    parts = take_apart(params, adapters, train_also=("norm", "embed_tokens"))
    tx = make_optimizer(sx.Optimizer(lr=1e-2, schedule="constant", warmup=0), 10)
    step = make_step(model, tx, jax.random.key(1))
    initial = jax.device_get((model.params, parts))
    first, numbers = step(start(parts, tx), parts.frozen, parts.base, a_batch(1, 4))
    snapshot = jax.device_get(first)
    second, _ = step(first, parts.frozen, parts.base, a_batch(1, 4, seed=1))
    return step, initial, snapshot, jax.device_get(second), jax.device_get(numbers), parts


def test_no_recompilation_on_the_second_step(two_steps):
    assert two_steps[0]._cache_size() == 1


def test_every_trained_leaf_moves_and_nothing_else(model, two_steps):
    _, (params, parts), first, second, numbers, final = two_steps
    for name, leaf in flat(first.train).items():
        if name.endswith(".a"):  # the gradient of a is zero until b has moved
            continue
        assert np.abs(leaf - flat(parts.train)[name]).max() > 0, name
    for name, leaf in flat(second.train).items():
        assert np.abs(leaf - flat(first.train)[name]).max() > 0, name
    chex.assert_trees_all_equal(jax.device_get((model.params, final)), (params, parts))
    assert set(numbers["grad_norms"]) == {*nodes(parts.adapters), *parts.trained_base}


def test_the_optimiser_never_sees_base_or_indices(two_steps):
    _, (_, parts), _, second, _, _ = two_steps
    shapes = {leaf.shape for leaf in jax.tree.leaves(second.opt)}
    assert shapes == {leaf.shape for leaf in jax.tree.leaves(parts.train)} | {()}
    assert not any(name.endswith("idx") for name in flat(second))


def test_the_loss_is_the_mean_over_tokens_that_count(model):
    batch = a_batch(1, 4)
    flat_batch = {name: jnp.asarray(array[0]) for name, array in batch.items()}
    logits = model.apply(model.params, None, flat_batch["tokens"], segment_ids=flat_batch["segments"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, flat_batch["targets"])
    expected = jnp.sum(losses * flat_batch["counts"]) / jnp.sum(flat_batch["counts"])
    params, adapters = sx.attach(jax.random.key(0), model.params, RULES)
    parts = take_apart(params, adapters)
    total, tokens = make_loss(model)(parts.train, parts.frozen, parts.base, flat_batch)
    chex.assert_trees_all_close(total / tokens, expected, rtol=1e-5)


@pytest.mark.parametrize("also", [(), ("embed_tokens",)])
def test_accumulation_equals_a_larger_batch(model, also):
    params, adapters = sx.attach(jax.random.key(0), model.params, [("mlp", sx.LoRA(rank=4))])
    parts = take_apart(params, adapters, train_also=also)
    tx = optax.sgd(1.0)
    step = make_step(model, tx, jax.random.key(1))
    batch = a_batch(1, 4)
    halves = {name: array.reshape(2, 2, -1) for name, array in batch.items()}
    counts = halves["counts"].sum((1, 2))
    assert counts[0] != counts[1]
    first, numbers = step(start(parts, tx), parts.frozen, parts.base, batch)
    second, values = step(start(parts, tx), parts.frozen, parts.base, halves)
    chex.assert_trees_all_close(first.train, second.train, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(numbers["loss"], values["loss"], rtol=1e-5)


def test_a_trained_head_gives_the_gradient_of_the_whole_model(model):
    """The tied embedding is both ends of the model."""
    parts = take_apart(model.params, {}, train_also=("embed_tokens",))
    tx, batch = optax.sgd(1.0), a_batch(1, 2)

    def loss(trained):
        arrays = {name: jnp.asarray(array[0]) for name, array in batch.items()}
        params = put_together(parts.base, trained)
        logits = model.apply(params, None, arrays["tokens"], segment_ids=arrays["segments"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, arrays["targets"])
        return jnp.sum(losses * arrays["counts"]) / jnp.sum(arrays["counts"])

    state, _ = make_step(model, tx, jax.random.key(1))(start(parts, tx), parts.frozen, parts.base, batch)
    gradient = jax.tree.map(lambda old, new: old - new, parts.trained_base, state.train["base"])
    chex.assert_trees_all_close(gradient, jax.grad(loss)(parts.trained_base), rtol=1e-4, atol=1e-6)


def test_full_fine_tuning_keeps_one_copy_of_the_base(model):
    parts = take_apart(model.params, {}, train_base=True)
    assert parts.base == {} and parts.count == sum(leaf.size for leaf in jax.tree.leaves(model.params))


def test_biases_of_adapted_projections_are_chosen():
    paths = [f"layers/{name}/{leaf}" for name in ("q_proj", "k_proj") for leaf in ("kernel", "bias")]
    assert selected(paths, False, ("adapted_bias",), ["layers/q_proj/kernel"]) == ["layers/q_proj/bias"]


@pytest.mark.parametrize(
    "also, problem",
    [(("bias",), "has no bias"), (("adapted_bias",), "has no adapted_bias"), (("lm_head",), "the head is tied")],
)
def test_train_also_must_match(model, also, problem):
    with pytest.raises(sx.SboraxError, match=problem):
        take_apart(model.params, {}, train_also=also)


def test_schedules():
    linear = schedule(sx.Optimizer(lr=1.0, schedule="linear", warmup=4, final=0.5), 14)
    chex.assert_trees_all_close([float(linear(i)) for i in (0, 3, 4, 9, 14)], [0.25, 1.0, 1.0, 0.75, 0.5], rtol=1e-6)
    cosine = schedule(sx.Optimizer(lr=1.0, schedule="cosine", warmup=0.2), 10)
    chex.assert_trees_all_close([float(cosine(i)) for i in (0, 1, 2, 6, 10)], [0.5, 1.0, 1.0, 0.5, 0.0], atol=1e-6)
    constant = schedule(sx.Optimizer(lr=1.0, schedule="constant", warmup=0), 10)
    assert [float(constant(i)) for i in (0, 9)] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adafactor"])
def test_every_optimiser_goes_downhill(name):
    tx = make_optimizer(sx.Optimizer(name=name, lr=0.05, schedule="constant", warmup=0), 50)
    params = {"adapters": {}, "base": {"w": jnp.full((4,), 2.0)}}
    state = tx.init(params)
    for _ in range(50):
        grads = jax.grad(lambda tree: jnp.sum(tree["base"]["w"] ** 2))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.sum(params["base"]["w"] ** 2)) < 8.0


def test_decay_spares_norms_and_biases():
    tx = make_optimizer(sx.Optimizer(lr=0.1, decay=1.0, schedule="constant", warmup=0), 10)
    train = {"adapters": {"a": jnp.ones(2)}, "base": {"norm/scale": jnp.ones(2), "q/bias": jnp.ones(2)}}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, train), tx.init(train), train)
    assert float(jnp.max(jnp.abs(updates["adapters"]["a"]))) > 0
    chex.assert_trees_all_equal(updates["base"], jax.tree.map(jnp.zeros_like, train["base"]))


# Runs


@pytest.fixture(scope="module")
def run(places, tmp_path_factory):
    """A run from start to end."""
    out, output = tmp_path_factory.mktemp("runs") / "whole", []
    held_out = sx.Eval(data=dataclasses.replace(an_experiment(places).data, limit=6), every=4)
    experiment = an_experiment(places, eval=held_out)
    return experiment, out, train(experiment, out, echo=output.append), output


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def eval_losses(out):
    return [json.loads(line) for line in (out / "eval_losses.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(run):
    experiment, out, summary, output = run
    lines = metrics(out)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 6]
    assert losses[-1] < losses[0] and summary.finished
    assert (summary.first_loss, summary.last_loss) == (losses[0], losses[-1])
    assert summary.eval_loss == lines[-1]["eval_loss"]
    samples = eval_losses(out)
    # Six of four rows a batch: the two rows of padding are none.
    assert [sample["item"] for sample in samples] == list(range(6))
    assert len({sample["digest"] for sample in samples}) == 6 and all(sample["tokens"] > 0 for sample in samples)
    mean = sum(sample["loss"] for sample in samples) / sum(sample["tokens"] for sample in samples)
    assert mean == pytest.approx(summary.eval_loss, rel=1e-6)
    assert json.loads((out / "summary.json").read_text()) == dataclasses.asdict(summary)
    assert sx.load_experiment(str(out)) == experiment
    text = "\n".join(output)
    assert "layers/mlp/up_proj: 2 x (32, 48), LoRA(rank=4, dropout=0.1)" in text
    assert "not adapted: layers/self_attn/k_proj, layers/self_attn/o_proj" in text
    assert f"trainable: {summary.trainable_parameters:,} parameters" in text
    assert "24 samples of 24 records, 0 too long (dropped)" in text


def test_the_saved_adapter_is_the_trained_one(run, model):
    experiment, out, summary, _ = run
    params, adapters = load_adapter(out / "adapter", model.params)
    chex.assert_trees_all_equal(params, model.params)
    assert sx.count(adapters) == summary.trainable_parameters
    fresh = sx.attach(jax.random.key(experiment.seed_adapter), model.params, experiment.rules)[1]
    chex.assert_trees_all_equal(sx.split(adapters)[1], sx.split(fresh)[1])
    for path, node in nodes(adapters).items():
        assert float(jnp.abs(node.train["b"]).max()) > 0, path


def test_the_loss_of_a_sample_is_that_of_its_tokens(run, model):
    experiment, out, _, _ = run
    params, adapters = load_adapter(out / "adapter", model.params)
    batches = read_held_out(experiment, load_model(experiment.model), quiet)
    for sample, row in zip(eval_losses(out), range(6), strict=True):
        batch = {name: jnp.asarray(array[row % 4][None]) for name, array in batches[row // 4].items()}
        logits = model.apply(params, adapters, batch["tokens"], segment_ids=batch["segments"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        expected = float(jnp.sum(losses * batch["counts"]))
        assert sample["loss"] == pytest.approx(expected, rel=1e-4) and sample["tokens"] == int(batch["counts"].sum())


def test_packed_rows_hold_the_same_samples(places):
    """Their digests and tokens do not depend on the rows in which they lie."""
    experiment = an_experiment(places)
    base, losses = load_model(experiment.model), []
    for packing in (False, True):
        data = dataclasses.replace(experiment.data, packing=packing, max_length=64, buckets=())
        described = dataclasses.replace(experiment, eval=sx.Eval(data=data))
        batches = read_held_out(described, base, quiet)
        losses.append([loss for batch in batches for loss in sample_losses(batch, batch["counts"].astype(np.float32))])
    assert max(int(batch["segments"].max()) for batch in batches) > 1
    assert len(losses[0]) == 24 and collections.Counter(losses[0]) == collections.Counter(losses[1])
    assert all(loss.loss == loss.tokens for loss in losses[1])


def test_an_evaluation_has_the_bits_of_the_loss(model):
    params, adapters = sx.attach(jax.random.key(0), model.params, RULES)
    parts = take_apart(params, adapters)
    batch = {name: jnp.asarray(array[0]) for name, array in a_batch(1, 4).items()}
    total, items, terms = make_evaluation(model)(parts.train, parts.frozen, parts.base, batch)
    alone = jax.jit(lambda train: sums(model, train, parts.frozen, parts.base, batch, None))(parts.train)
    chex.assert_trees_all_equal((total, items), (alone.losses["loss"], alone.items))
    chex.assert_trees_all_close(jnp.sum(terms), total, rtol=1e-6)
    chex.assert_trees_all_equal(terms == 0, ~batch["counts"])


def test_checkpoints_hold_no_base_and_only_the_newest_stay(run, model):
    experiment, out, _, _ = run
    checkpoints = open_checkpoints(epath.Path(out), 2)
    assert checkpoints.steps == [4, 6]
    names = checkpoints.manager.load(6)
    assert not any("embed" in name or "norm" in name for name in names)
    notes = checkpoints.manager.metadata(6).custom_metadata
    assert set(notes["digests"]) == set(names) and notes["position"] == {"epoch": 1, "row": 0}
    checkpoints.close()


def test_an_existing_run_is_not_overwritten(run, places):
    experiment, out, _, _ = run
    with pytest.raises(sx.SboraxError, match="exists and is not empty; --resume"):
        train(experiment, out, echo=quiet)
    with pytest.raises(sx.SboraxError, match="rules differs from the run to resume"):
        train(dataclasses.replace(experiment, rules=RULES[:1]), out, resume=True, echo=quiet)


def same_ends(first, second):
    """Adapter, losses and the last checkpoint, bit for bit."""
    assert (first / "adapter" / LEAVES).read_bytes() == (second / "adapter" / LEAVES).read_bytes()
    timed = ("seconds", "compiled", "tokens_per_second", "memory")
    lines = [[{k: v for k, v in line.items() if k not in timed} for line in metrics(out)] for out in (first, second)]
    assert lines[0] == lines[1]
    samples = [(out / "eval_losses.jsonl") for out in (first, second)]
    assert samples[0].exists() == samples[1].exists() == any("eval_loss" in line for line in lines[0])
    assert not samples[0].exists() or samples[0].read_bytes() == samples[1].read_bytes()
    states = []
    for out in (first, second):
        checkpoints = open_checkpoints(epath.Path(out), 2)
        states.append(checkpoints.manager.metadata(checkpoints.steps[-1]).custom_metadata)
        checkpoints.close()
    assert states[0] == states[1]


def test_a_signal_saves_and_resumption_ends_with_the_same_bits(run, tmp_path):
    experiment, reference, _, _ = run

    def stop(text):
        if text.startswith("step 1/"):
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = train(experiment, tmp_path / "cut", echo=stop)
    assert not stopped.finished and 1 <= stopped.steps < 6
    assert not (tmp_path / "cut" / "adapter").exists()
    output = []
    resumed = train(experiment, tmp_path / "cut", resume=True, echo=output.append)
    assert resumed.finished and f"resuming after step {stopped.steps}" in output
    same_ends(reference, tmp_path / "cut")


@pytest.mark.parametrize("train_base", [False, True])
def test_a_run_holds_what_it_trains_once(train_base, places, tmp_path, monkeypatch):
    """The state has copies of the leaves with which a run begins, and the step takes those over."""
    before = {id(array) for array in jax.live_arrays()}
    counts, step = [], RunStepper.step

    def counted(self, number, batch):
        result = step(self, number, batch)
        jax.block_until_ready(result)
        alive = [array for array in jax.live_arrays() if id(array) not in before and not array.is_deleted()]
        kept = [self.state, self.parts.base, self.parts.frozen, result]
        counts.append(sum(leaf.nbytes for leaf in alive) - sum(leaf.nbytes for leaf in jax.tree.leaves(kept)))
        return result

    monkeypatch.setattr(RunStepper, "step", counted)
    rules = () if train_base else RULES
    train(an_experiment(places, rules=rules, train_base=train_base, steps=2), tmp_path / "run", echo=quiet)
    # Batches and the keys of the random streams.
    assert max(counts) < 10_000


CHILD = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
import sborax as sx
from sborax.train.loop import train
train(sx.load_experiment(sys.argv[1]), sys.argv[2], resume=sys.argv[3] == "resume")
"""


def child(config, out, mode):
    # The three processes of a test compile once.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    environment = {**os.environ, **cache, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(config), str(out), mode]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.nightly
def test_kill_9_at_a_random_step_then_resume_ends_with_the_same_bits(places, tmp_path):
    from sborax.train.experiment import save_experiment

    experiment = an_experiment(places, steps=40, accumulate=2, save=sx.Save(every=3), batch_size=2)
    save_experiment(experiment, epath.Path(tmp_path))
    config, full, cut = tmp_path / "config.json", tmp_path / "whole", tmp_path / "cut"
    process = child(config, cut, "new")
    # Checkpoint 3 is whole once that of step 6 is begun; before, the killed run may have none to resume from.
    target = random.SystemRandom().randint(7, 30)
    file = cut / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (file.exists() and len(file.read_text().splitlines()) >= target):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cut / "adapter").exists(), f"the run had ended before step {target} was seen"
    for out, mode in ((full, "new"), (cut, "resume")):
        process = child(config, out, mode)
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
    assert "resuming after step" in text
    same_ends(full, cut)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(places, tmp_path):
    wild = sx.Optimizer(name="sgd", lr=1e18, clip=None, schedule="constant", warmup=0, betas=(0.0, 0.0))
    experiment = an_experiment(places, optimizer=wild, save=sx.Save(every=1), steps=20)
    with pytest.raises(
        sx.SboraxError, match=r"step (\d+): loss .*: not finite, stopped; checkpoint \d+ is kept"
    ) as caught:
        train(experiment, tmp_path / "run", echo=quiet)
    failed = int(str(caught.value).split(":")[0].split()[1])
    checkpoints = open_checkpoints(epath.Path(tmp_path / "run"), 2)
    assert checkpoints.steps[-1] == failed - 1
    checkpoints.close()
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, failed))


def test_an_adapter_without_a_gradient_is_named(places, tmp_path):
    dead = sx.Rule("q_proj", sx.scale(sx.LoRA(rank=2), 0.0))
    with pytest.raises(sx.SboraxError, match="layers/self_attn/q_proj/kernel: no gradient at all in the first step"):
        train(an_experiment(places, rules=(*RULES[:1], dead)), tmp_path / "run", echo=quiet)
    with pytest.raises(sx.SboraxError, match=r"a \(and 1 more\)"):
        check_alive({"a": 0.0, "b": 0.0, "c": 1e-20})


def test_full_fine_tuning_in_bfloat16(places, tmp_path):
    experiment = an_experiment(places, rules=(), train_base=True, precision="bfloat16", steps=2)
    summary = train(experiment, tmp_path / "run", echo=quiet)
    assert summary.trainable_parameters == summary.base_parameters
    model = load_model(places[0], "bfloat16")
    params, adapters = load_adapter(tmp_path / "run" / "adapter", model.params)
    assert adapters == {}
    for (path, old), new in zip(flat(model.params).items(), jax.tree.leaves(params), strict=True):
        assert new.dtype == jnp.bfloat16 and bool(jnp.any(old != new)), path


def test_quantisation_of_a_base_that_does_not_allow_it(places, tmp_path):
    with pytest.raises(sx.SboraxError, match="quant: layers/.*/kernel: NF4 cuts the input axis into blocks of 64"):
        train(an_experiment(places, quant="nf4"), tmp_path / "run", echo=quiet)


# Checkpoints


def damage(file):
    """Flip one byte in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


# orbax reads leaves side by side; where several fail it forgets all errors but one, which Python then reports.
forgotten = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def saved(tmp_path):
    rng = np.random.default_rng(0)
    trees = [{"w": jnp.asarray(rng.normal(size=(64, 65)), jnp.float32), "n": jnp.int32(i)} for i in range(3)]
    checkpoints = open_checkpoints(epath.Path(tmp_path), 3)
    for step, tree in enumerate(trees, start=1):
        checkpoints.save(step, tree, {"epoch": 0, "row": step})
    checkpoints.close()
    yield trees, tmp_path / "checkpoints"
    gc.collect()


@forgotten
def test_a_damaged_checkpoint_is_passed_over(saved, tmp_path):
    trees, folder = saved
    largest = max((file for file in (folder / "3").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    damage(largest)
    lines = []
    checkpoints = open_checkpoints(epath.Path(tmp_path), 3)
    tree, step = checkpoints.restore(trees[0], lines.append)
    checkpoints.close()
    assert step == 2 and "checkpoint 3 is damaged" in lines[0]
    chex.assert_trees_all_equal(tree, trees[1])


@forgotten
def test_a_checkpoint_with_a_missing_file_is_passed_over(saved, tmp_path):
    trees, folder = saved
    (folder / "3" / "state" / "manifest.ocdbt").unlink()
    checkpoints = open_checkpoints(epath.Path(tmp_path), 3)
    tree, step = checkpoints.restore(trees[0], quiet)
    checkpoints.close()
    assert step == 2
    chex.assert_trees_all_equal(tree, trees[1])


@pytest.mark.parametrize("members", [(), (2,)], ids=["run", "sweep"])
def test_a_checkpoint_under_another_number_is_passed_over(tmp_path, members):
    checkpoints = open_checkpoints(epath.Path(tmp_path), 9)
    trees = {}
    for step in (3, 6, 9):
        # Of a sweep one member has stopped before.
        steps = jnp.full(members, step, jnp.int32) if not members else jnp.asarray([1, step], jnp.int32)
        trees[step] = {"run": TrainState(steps, {"w": jnp.full(3, float(step))}, ())}
        checkpoints.save(step, trees[step], {"epoch": 0, "row": step})
    checkpoints.close()
    folder = tmp_path / "checkpoints"
    (folder / "9").rename(folder / "12")
    (folder / "3").rename(folder / "9")
    lines = []
    checkpoints = open_checkpoints(epath.Path(tmp_path), 9)
    tree, step = checkpoints.restore(trees[3], lines.append)
    checkpoints.close()
    assert step == 6
    assert lines == [
        "checkpoint 12 is damaged (it holds the state after step 9); trying the one before",
        "checkpoint 9 is damaged (it holds the state after step 3); trying the one before",
    ]
    chex.assert_trees_all_equal(tree, trees[6])


@forgotten
def test_every_checkpoint_damaged_is_an_error(saved, tmp_path):
    trees, folder = saved
    for step in (1, 2, 3):
        for file in (folder / str(step) / "state" / "d").iterdir():
            damage(file)
    checkpoints = open_checkpoints(epath.Path(tmp_path), 3)
    with pytest.raises(sx.SboraxError, match="all 3 checkpoints are damaged"):
        checkpoints.restore(trees[0], quiet)
    checkpoints.close()


def test_a_checkpoint_of_another_experiment_is_refused(saved, tmp_path):
    trees, _ = saved
    checkpoints = open_checkpoints(epath.Path(tmp_path), 3)
    with pytest.raises(sx.SboraxError, match=r"w is float32\[64, 65\], this experiment has float32\[2\]"):
        checkpoints.restore({"w": jnp.ones(2), "n": jnp.int32(0)}, quiet)
    with pytest.raises(sx.SboraxError, match="lacks more"):
        checkpoints.restore({**trees[0], "more": jnp.ones(2)}, quiet)
    checkpoints.close()


@pytest.mark.parametrize("procedure", [None, sx.COLA(every=2)], ids=["alone", "COLA"])
def test_lora_fa_trains_b_alone(places, tmp_path, model, procedure):
    """a is neither counted, nor in a checkpoint, nor moved; a resumed run ends in the same bits."""
    optimizer = sx.Optimizer(name="lora_fa", lr=1e-2)
    experiment = an_experiment(
        places, rules=[("mlp", sx.LoRA(rank=4))], optimizer=optimizer, steps=4, procedure=procedure
    )
    lines = []
    train(experiment, tmp_path / "run", echo=lines.append)
    outs = 2 * (48 + 48 + 32)
    assert any(line.startswith(f"trainable: {4 * outs:,} parameters") for line in lines)
    _, adapters = load_adapter(tmp_path / "run" / "adapter", model.params)
    if procedure is None:
        _, begun = sx.attach(jax.random.key(0), model.params, experiment.rules)
        for path, node in nodes(adapters).items():
            chex.assert_trees_all_equal(node.train["a"], nodes(begun)[path].train["a"])
            assert jnp.any(node.train["b"] != 0)
    content = (tmp_path / "run" / "adapter" / LEAVES).read_bytes()
    for half in ("checkpoints/4", "adapter"):
        subprocess.run(["rm", "-r", str(tmp_path / "run" / half)], check=True)
    train(experiment, tmp_path / "run", resume=True, echo=quiet)
    assert (tmp_path / "run" / "adapter" / LEAVES).read_bytes() == content


@pytest.mark.nightly
def test_an_experiment_is_handed_to_few_files(places, tmp_path):
    """Whoever adds a field of an experiment has these files to read."""
    package, files = os.path.dirname(sx.__file__), set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package):
            arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(isinstance(frame.f_locals.get(name), sx.Experiment) for name in arguments):
                files.add(os.path.relpath(code.co_filename, package))

    profiler = sys.getprofile()
    sys.setprofile(note)
    try:
        train(an_experiment(places, steps=1), tmp_path / "run", echo=lambda text: None)
    finally:
        sys.setprofile(profiler)
    assert {"train/read.py", "train/prepare.py", "train/loop.py"} <= files
    rooms = ("config/codec", "train/experiment", "train/log", "train/loop", "train/prepare", "train/read")
    assert files <= {f"{room}.py" for room in rooms}
