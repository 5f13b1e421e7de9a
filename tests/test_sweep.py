"""Sweeps: every member is its own single run, over one load, one compiled step and one copy of the base."""

import collections
import dataclasses
import json
import math
import os
import re
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from nightly import nightly_unless

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.cli.main import main
from sborax.layout.state import take_apart
from sborax.models import load_model
from sborax.records.adapter import read_adapter
from sborax.records.lengths import read_lengths
from sborax.sweep import run as module
from sborax.sweep import stepper as sweep_stepper
from sborax.sweep.grid import LONGEST, Sweep, read_grid
from sborax.sweep.members import (
    MemberConstants,
    StackedMembers,
    gather,
    make_sweep_evaluation,
    make_sweep_step,
    rates,
)
from sborax.sweep.run import sweep
from sborax.train.experiment import save_experiment
from sborax.train.loop import train
from sborax.train.optimizer import schedule
from sborax.train.read import read_model
from tests.tiny_model import write_data, write_model

RULES = (sx.Rule("self_attn/(q|v)", sx.SBoRA(rank=4, dropout=0.1)), sx.Rule("mlp", sx.LoRA(rank=4, alpha=4.0)))
GRID = {"optimizer.lr": (1e-2, 3e-2), "seed_adapter": (0, 1), "rules.0.method.alpha": (4.0, 8.0)}


UNLIKE = ("seconds", "compiled", "tokens_per_second", "memory")
"""Numbers of a step that differ from run to run."""


def quiet(_):
    """Says nothing."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    return str(write_model(place / "model")), str(write_data(place / "data.jsonl"))


def an_experiment(places, **changes):
    data = sx.Data(places[1], template="{instruction}", answer=" {output}", max_length=32, buckets=(32,))
    settings = {
        "model": places[0],
        "data": data,
        "rules": RULES,
        "optimizer": sx.Optimizer(lr=1e-2, decay=0.01),
        "steps": 4,
        "batch_size": 2,
        "save": sx.Save(every=2),
    }
    return sx.Experiment(**(settings | changes))


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_run(first, second, atol):
    """Adapters entry by entry, losses and every other number of each step, up to rounding."""
    mine, theirs = (read_adapter(run / "adapter") for run in (first, second))
    chex.assert_trees_all_close(mine.adapters, theirs.adapters, rtol=0, atol=atol)
    assert (mine.base, mine.rules, mine.about) == (theirs.base, theirs.rules, theirs.about)
    lines = [[{k: v for k, v in line.items() if k not in UNLIKE} for line in metrics(run)]
             for run in (first, second)]  # fmt: skip
    chex.assert_trees_all_close(*lines, rtol=1e-4, atol=1e-6)
    losses = [[line.get("loss", line.get("eval_loss")) for line in rows] for rows in lines]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    samples = [[json.loads(line) for line in (run / "eval_losses.jsonl").read_text().splitlines()]
               for run in (first, second) if any("eval_loss" in line for line in metrics(run))]  # fmt: skip
    for sample, expected in zip(*samples, strict=True) if samples else ():
        assert expected == sample | {"loss": pytest.approx(sample["loss"], rel=1e-6)}


# One after the other, by lax.map


@pytest.fixture(scope="module")
def swept(places, tmp_path_factory):
    """A sweep of eight, with what happened meanwhile."""
    out, counts = tmp_path_factory.mktemp("sweeps") / "eight", collections.Counter()
    experiment = an_experiment(places, eval=sx.Eval(data=dataclasses.replace(an_experiment(places).data, limit=3)))
    steps, evaluations, arrays = [], [], jax.live_arrays()
    ids = {id(array) for array in arrays}

    def load(*args, **kwargs):
        counts["loads"] += 1
        return read_model(*args, **kwargs)

    def make(*args):
        steps.append(make_sweep_step(*args))
        return steps[-1]

    def make_evaluation(*args):
        evaluations.append(make_sweep_evaluation(*args))
        return evaluations[-1]

    def look(text):
        if text.startswith("step 4/"):
            alive = [array for array in jax.live_arrays() if id(array) not in ids and not array.is_deleted()]
            counts.update(("alive", array.shape) for array in alive)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_model", load)
        patch.setattr(sweep_stepper, "make_sweep_step", make)
        patch.setattr(sweep_stepper, "make_sweep_evaluation", make_evaluation)
        results = sweep(Sweep(experiment, GRID), out, echo=look)
    del arrays
    counts["evaluations"] = sum(evaluation._cache_size() for evaluation in evaluations)
    counts["programs"] = sum(step._cache_size() for step in steps)
    return experiment, out, results, counts


@pytest.mark.parametrize("number", nightly_unless([], [1, 6]))
def test_a_member_is_its_own_single_run(swept, tmp_path, number):
    experiment, out, _, _ = swept
    member = Sweep(experiment, GRID).members()[number]
    summary = train(sx.load_experiment(str(out / member.name)), tmp_path / "alone", echo=quiet)
    # Adam divides what differs by rounding by a small moment.
    same_run(tmp_path / "alone", out / member.name, atol=1e-5)
    record = json.loads((out / member.name / "summary.json").read_text())
    assert record.keys() == dataclasses.asdict(summary).keys() and record["finished"]
    for key in ("steps", "trainable_parameters", "base_parameters", "samples", "device"):
        assert record[key] == vars(summary)[key]


def test_every_member_keeps_the_losses_of_samples_by_one_program(swept):
    _, out, results, counts = swept
    assert counts["evaluations"] == 1
    for member in results.members:
        samples = [json.loads(line) for line in (out / member.name / "eval_losses.jsonl").read_text().splitlines()]
        mean = sum(sample["loss"] for sample in samples) / sum(sample["tokens"] for sample in samples)
        assert len(samples) == 3 and mean == pytest.approx(member.eval_loss, rel=1e-6)


def test_members_differ_in_indices_rates_and_scales(swept):
    """Else equality with single runs would say little."""
    experiment, out, results, _ = swept
    trees = [nodes(read_adapter(out / member.name / "adapter").adapters) for member in results.members]
    node = [tree["layers/self_attn/q_proj/kernel"] for tree in trees]
    assert not np.array_equal(node[0].frozen["idx"], node[2].frozen["idx"])
    chex.assert_trees_all_equal(node[0].frozen["idx"], node[4].frozen["idx"])
    chex.assert_trees_all_equal(2 * node[0].frozen["scale"], node[1].frozen["scale"])
    assert len({member.last_loss for member in results.members}) == 8
    assert [metrics(out / member.name)[0]["lr"] for member in results.members] == pytest.approx([1e-2] * 4 + [3e-2] * 4)


def test_startup_is_paid_once(swept):
    _, out, results, counts = swept
    assert counts["loads"] == 1 and counts["programs"] == 1
    for run in results.members:
        assert [line["compiled"] for line in metrics(out / run.name) if "loss" in line] == [True, False, False, False]


def test_one_copy_of_the_base_is_alive(swept, places):
    base = collections.Counter(leaf.shape for leaf in jax.tree.leaves(load_model(places[0]).params) if leaf.size > 64)
    alive = {shape: swept[3]["alive", shape] for shape in base}
    assert alive == dict(base)


def test_the_compiled_step_takes_one_base(places):
    members = Sweep(an_experiment(places), GRID).members()
    model = load_model(places[0])
    parts = [
        take_apart(model.params, sx.attach(jax.random.key(member.experiment.seed_adapter), model.params, RULES)[1])
        for member in members
    ]
    stacked, state = gather(members, parts, 4, at_once=1)
    batch = {name: np.zeros((1, 2, 32), np.int32) for name in ("tokens", "targets", "segments")}
    batch["counts"] = np.zeros((1, 2, 32), bool)
    arguments = (state, stacked.constants, stacked.shared, parts[0].base, batch)
    lowered = jax.eval_shape(lambda *leaves: leaves, *arguments)
    expected = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(lowered) if leaf.dtype.name != "key<fry>"
    )
    expected += len(members) * 8 - stacked.constants.optimizer.nbytes  # the keys, and no choice among optimisers
    memory = make_sweep_step(model, stacked).lower(*arguments).compile().memory_analysis()
    assert memory.argument_size_in_bytes == expected
    # Scales and dropout rates that no member changes are there once, and nothing of a member is.
    assert {leaf.shape for leaf in stacked.shared} == {(2,)}
    assert {leaf.shape for leaf in stacked.constants.frozen} == {(8, 2, 4)}


def test_the_best_is_marked(swept):
    _, out, results, _ = swept
    record = json.loads((out / "sweep.json").read_text())
    losses = {member.name: member.eval_loss for member in results.members}
    assert record["best"] == results.best == min(losses, key=lambda name: losses[name])
    assert [member["name"] for member in record["members"]] == list(losses)
    assert record["members"][3]["changes"] == ["optimizer.lr=0.01", "seed_adapter=1", "rules.0.method.alpha=8.0"]
    lines = results.table()
    assert [line for line in lines if line.endswith("  best")] == [lines[1 + list(losses).index(results.best)]]


def test_commands_take_a_member_for_a_run(swept, tmp_path, capsys):
    run = str(swept[1] / swept[2].best)
    assert main(["generate", run, "--prompt", "1 plus 1?", "--max-new-tokens", "2"]) == 0
    assert main(["merge", run, str(tmp_path / "merged")]) == 0
    assert main(["export", run, str(tmp_path / "peft"), "--as", "lora"]) == 0
    assert (tmp_path / "merged" / "config.json").exists() and (tmp_path / "peft" / "adapter_config.json").exists()
    capsys.readouterr()


# Several together, by vmap


@pytest.mark.nightly
def test_optimisers_of_other_links_beside_each_other(places, tmp_path):
    """LoRA+ is one link more in the chain."""
    grid = {"optimizer.b_ratio": (1.0, 4.0)}
    # With a small eps Adam turns rounding of tiny gradients into steps.
    experiment = an_experiment(places, optimizer=sx.Optimizer(lr=1e-2, eps=1e-4, decay=0.01))
    sweep(Sweep(experiment, grid, at_once=2), tmp_path / "two", echo=quiet)
    train(Sweep(experiment, grid).members()[1].experiment, tmp_path / "alone", echo=quiet)
    same_run(tmp_path / "alone", tmp_path / "two" / "b_ratio=4.0", atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 5, 9])
def test_members_keep_their_places_however_many_go_together(at_once):
    stacked = StackedMembers(MemberConstants([], 0, 0, 0), [], lambda shared, frozen: frozen, (), 5, at_once)
    numbers = jnp.arange(5, dtype=jnp.float32)
    np.testing.assert_array_equal(stacked.over(lambda number: 2 * number + 1)(numbers), 2 * numbers + 1)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_rates_are_those_of_the_schedule(kind):
    optimizer = sx.Optimizer(lr=3e-3, schedule=kind, warmup=3, final=0.1)
    expected = [float(schedule(optimizer, 10)(step)) for step in range(10)]
    np.testing.assert_allclose(rates(optimizer, 10), expected, rtol=5e-7)


@pytest.mark.nightly
def test_a_diverged_member_is_told_and_the_others_go_on_also_after_a_signal(places, tmp_path, capsys):
    description = Sweep(an_experiment(places), {"optimizer.lr": ("1e-2", "1e17")}, at_once=2)
    messages = []
    reference = sweep(description, tmp_path / "whole", echo=messages.append)
    good, bad = reference.members
    assert (good.diverged, bad.diverged) == (None, 2) and reference.best == "lr=1e-2"
    assert (good.steps, bad.steps) == (4, 1) and math.isfinite(bad.last_loss)
    assert "lr=1e17: loss nan" in "".join(messages) and any(line.endswith("diverged at step 2") for line in messages)
    assert (tmp_path / "whole" / "lr=1e-2" / "adapter").exists()
    assert not (tmp_path / "whole" / "lr=1e17" / "adapter").exists()
    assert [line["step"] for line in metrics(tmp_path / "whole" / "lr=1e17")] == [1]
    assert not json.loads((tmp_path / "whole" / "lr=1e17" / "summary.json").read_text())["finished"]

    def stop(text):
        if text.startswith("step 1/"):
            os.kill(os.getpid(), signal.SIGTERM)

    cut = sweep(description, tmp_path / "cut", echo=stop)
    assert not cut.finished and cut.members[0].steps < 4
    save_experiment(description.experiment, epath.Path(tmp_path))
    words = ["optimizer.lr=1e-2,1e17", "--at-once", "2", "--out", str(tmp_path / "cut"), "--resume"]
    assert main(["sweep", str(tmp_path / "config.json"), *words]) == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "2 members: lr=1e-2, lr=1e17" and f"resuming after step {cut.members[0].steps}" in output
    assert output[-4:] == [*reference.table(), f"done: {tmp_path / 'cut'}"]
    results = [json.loads((tmp_path / run / "sweep.json").read_text()) for run in ("whole", "cut")]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}
    for name in ("lr=1e-2", "lr=1e17"):
        lines = [[{**line, **dict.fromkeys(UNLIKE)} for line in metrics(tmp_path / run / name)]
                 for run in ("whole", "cut")]  # fmt: skip
        assert lines[0] == lines[1]
    saved = [(tmp_path / run / "lr=1e-2" / "adapter" / "adapter.safetensors").read_bytes() for run in ("whole", "cut")]
    assert saved[0] == saved[1]
    with pytest.raises(sx.SboraxError, match="holds a sweep over lr=1e-2; lr=1e17; resume it with the same values"):
        sweep(Sweep(description.experiment, {"optimizer.lr": (1e-2, 2e-2)}), tmp_path / "cut", resume=True, echo=quiet)
    with pytest.raises(sx.SboraxError, match="exists and is not empty; --resume"):
        sweep(description, tmp_path / "cut", echo=quiet)


def content(place):
    """The content of every file, and when it was written; checkpoints and locks left out."""
    files = [file for file in place.rglob("*") if file.is_file() and file.name != ".lock"]
    by_name = {str(file.relative_to(place)): file for file in files}
    return {
        name: (file.read_bytes(), file.stat().st_mtime_ns)
        for name, file in by_name.items()
        if not name.startswith("checkpoints/")
    }


@pytest.mark.nightly
def test_a_finished_sweep_is_left_as_it_is(places, tmp_path):
    experiment = an_experiment(places, optimizer=sx.Optimizer(schedule="constant", warmup=0))
    grid, out = {"optimizer.lr": (1e-2, 1e17)}, tmp_path / "out"
    results = sweep(Sweep(experiment, grid), out, echo=quiet)
    initial, lines = content(out), []
    assert sweep(Sweep(experiment, grid), out, resume=True, echo=lines.append) == results
    assert content(out) == initial
    assert lines[-4:] == [*results.table(), f"already finished after step 4: {out}"]
    # Fewer steps are refused, and nothing of the refused config is kept.
    fewer = Sweep(dataclasses.replace(experiment, steps=3), grid)
    with pytest.raises(sx.SboraxError, match="has made 4 steps, and is to make 3; give it 4 or more"):
        sweep(fewer, out, resume=True, echo=quiet)
    assert content(out) == initial
    # An adapter that is missing is written again, with the same bits.
    name = "lr=0.01/adapter/plan.json"
    (out / name).unlink()
    sweep(Sweep(experiment, grid), out, resume=True, echo=quiet)
    assert content(out)[name][0] == initial[name][0]
    extension = Sweep(dataclasses.replace(experiment, steps=5), grid)
    assert [result.steps for result in sweep(extension, out, resume=True, echo=quiet).members] == [5, 1]


def test_members_that_went_on_record_the_lengths_of_their_rates(places, tmp_path):
    experiment = an_experiment(places, steps=2, optimizer=sx.Optimizer(schedule="linear", warmup=0))
    for steps in (2, 3):
        description = Sweep(dataclasses.replace(experiment, steps=steps), {"optimizer.lr": (1e-2, 2e-2)})
        sweep(description, tmp_path / "out", resume=steps > 2, echo=quiet)
    lengths = [read_lengths(epath.Path(tmp_path / "out" / name)) for name in ("lr=0.01", "lr=0.02")]
    assert lengths == [{0: 2, 2: 3}] * 2


def test_when_all_diverge_the_sweep_ends(places, tmp_path):
    description = Sweep(an_experiment(places), {"optimizer.lr": (1e38, 2e38)}, at_once=2)
    with pytest.raises(sx.SboraxError, match="step 1: no member is left, all 2 have a loss that is not finite"):
        sweep(description, tmp_path / "two", echo=quiet)


@pytest.mark.nightly
def test_a_base_that_is_rewritten_is_so_once(places, tmp_path):
    experiment = an_experiment(places, rules=(sx.Rule("q_proj", sx.PiSSA(rank=2)),), steps=2)
    grid = {"optimizer.lr": (1e-3, 1e-2)}
    sweep(Sweep(experiment, grid), tmp_path / "two", echo=quiet)
    train(Sweep(experiment, grid).members()[1].experiment, tmp_path / "alone", echo=quiet)
    same_run(tmp_path / "alone", tmp_path / "two" / "lr=0.01", atol=1e-6)


@pytest.mark.nightly
def test_members_have_banks_of_their_own(places, tmp_path):
    """Each trains, decays and clips what all of its kernels share."""
    rules = (
        sx.Rule("self_attn", sx.VBLoRA(rank=2, vectors=6, length=8, dropout=0.1)),
        sx.Rule("mlp/(gate|up)", sx.UniLoRA(rank=2, coefficients=30)),
        sx.Rule("mlp/down", sx.Lily(rank=2, routing="batch")),
    )
    experiment = an_experiment(places, rules=rules)
    grid = {"seed_adapter": (0, 1), "rules.1.method.bound": (0.1, 0.5)}
    sweep(Sweep(experiment, grid), tmp_path / "four", echo=quiet)
    for number in (1, 2):
        member = Sweep(experiment, grid).members()[number]
        train(member.experiment, tmp_path / str(number), echo=quiet)
        same_run(tmp_path / str(number), tmp_path / "four" / member.name, atol=1e-6)


# What is typed


def test_values_and_names():
    changes, grid = read_grid(["steps=4", "optimizer.lr=1e-4,3e-4", "optimizer.betas=[0.9,0.99],[0.8,0.9]", "x='a,b'"])
    assert changes == ["steps=4", "x='a,b'"]
    assert grid == {"optimizer.lr": ("1e-4", "3e-4"), "optimizer.betas": ("[0.9,0.99]", "[0.8,0.9]")}
    plain = sx.Experiment(model="m", data=sx.Data("d"), rules=RULES, steps=1)
    names = [member.name for member in Sweep(plain, grid).members()]
    assert names == [f"lr={lr},betas={betas}" for lr in grid["optimizer.lr"] for betas in grid["optimizer.betas"]]
    alphas = {"rules.0.method.alpha": (1.0, 2.0), "rules.1.method.alpha": (1.0,)}
    assert [member.name for member in Sweep(plain, alphas).members()] == [
        "rules.0.method.alpha=1.0",
        "rules.0.method.alpha=2.0",
    ]


def test_a_name_too_long_for_a_directory_is_cut():
    patterns = [json.dumps([[f"({'|'.join(30 * ['q_proj'])}){last}", {"type": "LoRA"}]]) for last in "ab"]
    plain = sx.Experiment("m", sx.Data("d"), RULES, steps=1)
    members = Sweep(plain, {"rules": patterns, "seed_adapter": (0, 1)}).members()
    names = [member.name for member in members]
    assert len(set(names)) == 4 and {len(name) for name in names} == {LONGEST}
    assert [member.changes[0] for member in members[::2]] == [f"rules={pattern}" for pattern in patterns]


WRONG = [
    ((), "nothing to sweep over: give a key several values"),
    (("optimizer.lr=1e-4",), "nothing to sweep over"),
    (("optimizer.lr=1e-4,1e-4",), "optimizer.lr: 1e-4 is given twice"),
    (("optimizer.lr=1e-4,1e-4", "optimizer.lr=1,2"), "optimizer.lr: is given twice"),
    (("optimizer.lr=1e-4,0.0001",), "lr=0.0001 and lr=1e-4 are the same run"),
    (("optimizer.lr=1e-4,",), "optimizer.lr: must be a number"),
    (("optimizer.*.lr=1,2",), r"optimizer.\*.lr: optimizer is no list"),
    (("optimizer.rate=1,2",), "optimizer.rate: unknown key"),
    (("seed_adapter=0,1", 'mesh={"data": 2}'), "mesh: a sweep runs on one device"),
    (("seed_adapter=0,1", "mesh=fsdp=2,tensor=2"), "mesh: a sweep runs on one device"),
    (("seed_adapter=0,1", "--mesh", "data=2"), "mesh: a sweep runs on one device"),
    (("optimizer.lr=1e-4,3e-4", "--at-once", "0"), "at_once must be at least 1"),
]


@pytest.mark.parametrize("words, problem", WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_mistakes_are_one_line(places, tmp_path, capsys, words, problem):
    save_experiment(an_experiment(places), epath.Path(tmp_path))
    assert main(["sweep", str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(problem, line), line
