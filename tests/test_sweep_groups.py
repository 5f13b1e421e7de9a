"""Sweeps whose members differ in more than arrays: each group of alike members has a program, all over one base."""

import contextlib
import dataclasses
import os
import re
import signal

import pytest
from etils import epath

import sborax as sx
from sborax.cli.main import main
from sborax.records.adapter import LEAVES
from sborax.records.checkpoint import CHECKPOINTS
from sborax.sweep import run as module
from sborax.sweep.grid import Sweep
from sborax.sweep.groups import grouped
from sborax.sweep.results import read_results
from sborax.sweep.run import claim_runs, sweep
from sborax.sweep.stepper import SweepStepper
from sborax.train.experiment import save_experiment
from sborax.train.loop import train
from tests.test_sweep import an_experiment, content, metrics, quiet, same_run
from tests.tiny_model import write_data, write_model

METHODS = (sx.LoRA(rank=2), sx.LoRA(rank=4), sx.SBoRA(rank=4, alpha=4.0), sx.Bone(rank=4))
GRID = {"rules.0.method": METHODS, "optimizer.lr": (1e-2, 3e-2)}
NAMES = [f"method={text}" for text in ("LoRA(rank=2)", "LoRA(rank=4)", "SBoRA(rank=4,alpha=4.0)", "Bone(rank=4)")]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    return str(write_model(place / "model")), str(write_data(place / "data.jsonl"))


def mixed(places, **changes):
    """An experiment with one rule, measured on a few held-out samples."""
    plain = an_experiment(places)
    # With a small eps Adam turns rounding of tiny gradients into steps.
    settings = {
        "rules": [("self_attn/(q|v)", sx.LoRA(rank=2))],
        "optimizer": sx.Optimizer(lr=1e-2, eps=1e-4),
        "eval": sx.Eval(dataclasses.replace(plain.data, limit=3)),
        "save": sx.Save(every=100),
    }
    return an_experiment(places, **(settings | changes))


def watched(description, out):
    """The results of a sweep, where the base lay in memory in each of its programs, and how often it was loaded."""
    bases, loads = [], []
    originals = SweepStepper.__init__, module.read_model

    def watch(self, members, prepared, stacked, state, base, *args):
        bases.append({path: leaf.unsafe_buffer_pointer() for path, leaf in base.items()})
        originals[0](self, members, prepared, stacked, state, base, *args)

    def load(*args):
        loads.append(args)
        return originals[1](*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SweepStepper, "__init__", watch)
        patch.setattr(module, "read_model", load)
        results = sweep(description, out, echo=quiet)
    return results, bases, len(loads)


@pytest.fixture(scope="module")
def swept(places, tmp_path_factory):
    """A sweep over ranks and methods."""
    out = tmp_path_factory.mktemp("sweeps") / "mixed"
    return out, *watched(Sweep(mixed(places), GRID), out)


def test_two_methods_in_one_sweep(places, tmp_path):
    """What the sweep below shows, in two programs of one member each."""
    experiment = mixed(places, eval=sx.Eval(), steps=2)
    description = Sweep(experiment, {"rules.0.method": METHODS[1:3]})
    results, bases, loads = watched(description, tmp_path / "two")
    assert loads == 1 and len(bases) == 2 and bases[0] == bases[1] and len(bases[0]) > 8
    assert [line.split()[1] for line in results.table()[1:]] == ["alone", "alone"]
    member = description.members()[1]
    train(member.experiment, tmp_path / "alone", echo=quiet)
    same_run(tmp_path / "alone", tmp_path / "two" / member.name, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(8))
def test_a_member_is_its_own_single_run(swept, places, tmp_path, number):
    member = Sweep(mixed(places), GRID).members()[number]
    train(member.experiment, tmp_path / "alone", echo=quiet)
    same_run(tmp_path / "alone", swept[0] / member.name, atol=1e-6)


@pytest.mark.nightly
def test_all_programs_read_the_same_buffers(swept):
    _, results, bases, loads = swept
    assert loads == 1 and len(bases) == 4 and len(bases[0]) > 8
    assert all(base == bases[0] for base in bases)
    assert len({result.last_loss for result in results.members}) == 8


@pytest.mark.nightly
def test_the_table_says_who_shared_a_program(swept, places):
    _, results, _, _ = swept
    assert [result.name for result in results.members] == [f"{name},lr={lr}" for name in NAMES for lr in (0.01, 0.03)]
    assert [result.program for result in results.members] == [1, 1, 2, 2, 3, 3, 4, 4]
    lines = results.table()
    assert [line.split()[1] for line in lines] == ["program", "1", "1", "2", "2", "3", "3", "4", "4"]
    assert [line.split()[0] for line in lines if line.endswith("  best")] == [results.best]


@pytest.mark.nightly
def test_a_finished_sweep_is_left_as_it_is(swept, places):
    out, results, bases, _ = swept
    contents, lines, programs = content(out), [], len(bases)
    assert sweep(Sweep(mixed(places), GRID), out, resume=True, echo=lines.append) == results
    assert content(out) == contents and len(bases) == programs
    assert lines[-1] == f"already finished after step 4: {out}"


def test_a_sweep_keeps_its_held_out_data(places, tmp_path):
    """Losses of other data, or of the training data, would be compared with those that are there."""
    place = epath.Path(tmp_path)
    (place / CHECKPOINTS / "1").mkdir(parents=True)
    for member in Sweep(mixed(places), GRID).members():
        (place / member.name).mkdir()
        save_experiment(member.experiment, place / member.name)
    plain = mixed(places).eval
    variant = dataclasses.replace(plain, every=1)
    for measured in (variant, sx.Eval(), sx.Eval(dataclasses.replace(plain.data, limit=2))):
        groups = grouped(Sweep(mixed(places, eval=measured), GRID).members())
        refused = pytest.raises(sx.SboraxError, match="eval.data differs .*; members are compared on the same data")
        with contextlib.nullcontext() if measured is variant else refused, contextlib.ExitStack() as claims:
            claim_runs(place, groups, claims)


@pytest.mark.nightly
@pytest.mark.parametrize("stopped", [1, 2])
def test_a_sweep_that_was_stopped_resumes_to_the_same_bits(swept, places, tmp_path, stopped):
    """In the first or in a later program."""
    begun = []

    def stop(text):
        begun.extend([text] if text == "compiling" else [])
        if text.startswith("step 1/") and len(begun) == stopped:
            os.kill(os.getpid(), signal.SIGTERM)

    cut = sweep(Sweep(mixed(places), GRID), tmp_path / "cut", echo=stop)
    steps = [result.steps for result in cut.members]
    assert not cut.finished and steps[2 * stopped :] == [0] * (8 - 2 * stopped) and 0 < steps[2 * stopped - 1] < 4
    assert steps[: 2 * stopped - 2] == [4] * (2 * stopped - 2)
    resumed = sweep(Sweep(mixed(places), GRID), tmp_path / "cut", resume=True, echo=quiet)
    assert resumed.members == swept[1].members and resumed.finished
    for result in resumed.members:
        contents = [(place / result.name / "adapter" / LEAVES).read_bytes() for place in (swept[0], tmp_path / "cut")]
        assert contents[0] == contents[1]
        assert [line["step"] for line in metrics(tmp_path / "cut" / result.name) if "loss" in line] == [1, 2, 3, 4]


ALIKE = [
    ({"optimizer.lr": (1.0, 2.0), "seed_adapter": (0, 1), "rules.0.method.alpha": (1.0, 2.0)}, [8]),
    ({"rules.0.method.rank": (2, 4), "seed_adapter": (0, 1)}, [2, 2]),
    ({"rules.0.method.dropout": (0.0, 0.1, 0.2)}, [1, 2]),
    ({"optimizer": (sx.Optimizer(), sx.Optimizer(name="sgd"))}, [1, 1]),
    ({"optimizer.betas": ([0.9, 0.99], [0.8, 0.99])}, [2]),
    ({"rules.0.pattern": ("q", "v")}, [1, 1]),
    ({"steps": (1, 2), "seed_data": (0, 1), "batch_size": (1, 2)}, [1] * 8),
    ({"rules.0.method": (sx.PiSSA(rank=2), sx.LoRA(rank=2)), "seed_adapter": (0, 1), "optimizer.lr": (1.0, 2.0)},
     [2, 2, 4]),
    *(({"optimizer": (sx.Optimizer(name=name, lr=1.0), sx.Optimizer(name=name, lr=2.0))}, [2])
      for name in ("lion", "adafactor", "lora_rite", "lora_fa")),
]  # fmt: skip


@pytest.mark.parametrize("grid, sizes", ALIKE, ids=lambda value: ",".join(value) if isinstance(value, dict) else "")
def test_members_that_differ_in_arrays_alone_share_a_program(places, grid, sizes):
    groups = grouped(Sweep(mixed(places), grid).members())
    assert [len(group.members) for group in groups] == sizes
    assert [group.number for group in groups] == list(range(1, len(sizes) + 1))


@pytest.mark.nightly
def test_members_of_other_data_order_and_length(places, tmp_path):
    """One diverges by itself, and the others go on."""
    grid = {"steps": (2, 3), "batch_size": (1, 2), "seed_data": (0, 1)}
    results = sweep(Sweep(mixed(places), grid), tmp_path / "eight", echo=quiet)
    assert [result.steps for result in results.members] == [2] * 4 + [3] * 4
    for number in (1, 6):
        member = Sweep(mixed(places), grid).members()[number]
        train(member.experiment, tmp_path / str(number), echo=quiet)
        same_run(tmp_path / str(number), tmp_path / "eight" / member.name, atol=1e-6)
    rates = sx.Optimizer(lr=1e17, decay=0.01), sx.Optimizer(name="adam", lr=1e-2)
    far = {"optimizer": rates, "batch_size": (1, 2)}
    results = sweep(Sweep(mixed(places), far), tmp_path / "far", echo=quiet)
    assert results.finished and [result.diverged for result in results.members] == [2, 2, None, None]
    second = sweep(Sweep(mixed(places), far), tmp_path / "far", resume=True, echo=quiet)
    assert second == results == read_results(epath.Path(tmp_path / "far"))


@pytest.mark.nightly
def test_bases_that_are_rewritten_leave_the_others_theirs(places, tmp_path):
    grid = {"rules.0.method": (sx.PiSSA(rank=2), sx.LoRA(rank=2)), "seed_adapter": (0, 1)}
    sweep(Sweep(mixed(places, steps=2), grid), tmp_path / "four", echo=quiet)
    for number, member in enumerate(Sweep(mixed(places, steps=2), grid).members()):
        train(member.experiment, tmp_path / str(number), echo=quiet)
        same_run(tmp_path / str(number), tmp_path / "four" / member.name, atol=1e-6)


WRONG = [
    (("quant=nf4", 'rules.0.method={"type":"PiSSA"},{"type":"LoRA"}'), "quant: members rewrite different kernels"),
    (("data.limit=1,2",), "data.limit: members may differ in rules, optimizer, .*; run each value of data.limit alone"),
    (("model=a,b",), "model: members may differ in"),
    (("eval.every=1,2",), "eval.every: members may differ in"),
    (("precision=float32,bfloat16",), "precision: members may differ in"),
]


@pytest.mark.parametrize("words, problem", WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_mistakes_are_one_line(places, tmp_path, capsys, words, problem):
    save_experiment(mixed(places), epath.Path(tmp_path))
    assert main(["sweep", str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(problem, line), line
    assert not (tmp_path / "out").exists()
