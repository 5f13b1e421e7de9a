"""Sweeps that choose what to train: members that halving stops, and learning rates that are added."""

import dataclasses
import os
import re
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import sborax as sx
from sborax.adapters.core import SboraxError
from sborax.cli.main import main
from sborax.evaluate.compare.rows import read_rows
from sborax.records.adapter import LEAVES
from sborax.sweep.grid import Sweep, read_grid
from sborax.sweep.members import MemberConstants, StackedMembers
from sborax.sweep.rates import EXTENSIONS, Sensitivity, extension, sensitivity
from sborax.sweep.results import Result, Results, rungs
from sborax.sweep.run import sweep
from sborax.train.experiment import save_experiment
from tests.test_sweep import content, metrics, quiet
from tests.test_sweep_groups import mixed
from tests.tiny_model import write_data, write_model

GRID = {"optimizer.lr": (1e-2, 1e-5, 3e-2, 1e-4), "rules.0.method.rank": (2, 4)}
"""Eight members of two programs; higher rates learn faster."""
PLAIN = sx.Experiment(
    model="m", data=sx.Data("d"), steps=1, rules=[("q", sx.LoRA(rank=2))], optimizer=sx.Optimizer(lr=1e-3)
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    return str(write_model(place / "model")), str(write_data(place / "data.jsonl"))


def losses(run):
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]


# Halving


def test_a_loss_that_is_no_number_is_the_highest():
    """The last update may have ruined a member that never had a loss or a gradient that is not finite."""
    lost, *peers = (
        Result(name, (), 1, 2, None, 1.0, loss)
        for name, loss in zip("abcd", (float("nan"), 3.0, 1.0, 2.0), strict=True)
    )
    for members in ((lost, *peers), (*peers[:1], lost, *peers[1:]), (*peers, lost)):
        results = Results(False, 0.0, members, (2,))
        assert results.best == "c"
        assert {result.name for result in results.halved(2).members if result.stopped} == {"a", "b"}
    assert Results(False, 0.0, (lost,)).best is None


def test_halving_stops_the_higher_losses():
    members = [
        Result(name, (), 1, 2, None, 1.0, loss)
        for name, loss in zip("abcdefg", (3.0, 1.0, 2.0, 2.0, 9.0, 5.0, 4.0), strict=True)
    ]
    members[4] = dataclasses.replace(members[4], diverged=1)
    first = Results(False, 0.0, tuple(members), (2, 4, 8)).halved(2)
    assert [result.name for result in first.members if result.stopped] == ["f", "g"]
    assert first.halved(2) == first
    second = first.halved(4)
    # Of equal losses the earlier member goes on.
    assert [(result.name, result.stopped) for result in second.members if result.stopped] == [
        ("a", 4),
        ("d", 4),
        ("f", 2),
        ("g", 2),
    ]
    plain = Sweep(PLAIN, {"optimizer.lr": (1.0, 2.0)}).members()[0]
    assert second.running([dataclasses.replace(plain, name=name) for name in "abcdefg"]) == [1, 2, 4]
    last = second.halved(8)
    assert last.best == "b" and sum(not (result.stopped or result.diverged) for result in last.members) == 1
    marks = [line.split("  ")[-1] for line in last.table()[1:]]
    assert marks == ["stopped at step 4", "best", "stopped at step 8", "stopped at step 4", "diverged at step 1",
                     "stopped at step 2", "stopped at step 2"]  # fmt: skip


@pytest.mark.parametrize(
    "count, steps, expected", [(8, 80, (10, 20, 40)), (5, 80, (10, 20, 40)), (2, 9, (4,)), (8, 3, (1,))]
)
def test_automatic_rungs_double(count, steps, expected):
    assert rungs("auto", dict.fromkeys(map(str, range(count)), steps)) == expected
    assert rungs((), {"a": steps}) == ()


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_a_step_computes_members_that_go_on(at_once):
    constants = MemberConstants([], 0, 0, 0)
    stacked = StackedMembers(constants, [], lambda shared, frozen: frozen, (), 5, at_once, running=(1, 4))
    numbers = jnp.arange(5, dtype=jnp.float32)
    subset = stacked.over(lambda number: 10 * number)(stacked.some(numbers))
    np.testing.assert_array_equal(subset, jnp.array([10.0, 40.0]))
    np.testing.assert_array_equal(stacked.replaced(numbers, subset), jnp.array([0.0, 10.0, 2.0, 3.0, 40.0]))


@pytest.fixture(scope="module")
def halved(places, tmp_path_factory):
    """A sweep with two rungs, and the same one without halving."""
    place = tmp_path_factory.mktemp("halved")
    results = sweep(Sweep(mixed(places, steps=9), GRID, halving=(3, 6)), place / "two", echo=quiet)
    reference = sweep(Sweep(mixed(places, steps=9, eval=an_eval(places)), GRID), place / "whole", echo=quiet)
    return place, results, reference


def an_eval(places):
    return dataclasses.replace(mixed(places).eval, every=3)


@pytest.mark.nightly
def test_survivors_are_those_of_a_sweep_without_halving(halved):
    place, results, reference = halved
    assert [result.steps for result in results.members] == [result.stopped or 9 for result in results.members]
    assert sorted(result.steps for result in results.members) == [3, 3, 3, 3, 6, 6, 9, 9]
    for result, twin in zip(results.members, reference.members, strict=True):
        curve, expected = losses(place / "two" / result.name), losses(place / "whole" / result.name)
        assert [step for step, _ in curve] == list(range(1, result.steps + 1))
        np.testing.assert_allclose(
            [loss for _, loss in curve], [loss for _, loss in expected[: result.steps]], rtol=1e-6
        )
        held_out = [line["eval_loss"] for line in metrics(place / "whole" / twin.name) if "eval_loss" in line]
        assert result.eval_loss == pytest.approx(held_out[result.steps // 3 - 1], rel=1e-6)
        assert (place / "two" / result.name / "adapter").exists() == (result.stopped is None)
    # At each rung, no member that stopped was better than one that went on.
    for rung in (3, 6):
        held_out = {
            result.name: next(line["eval_loss"] for line in metrics(place / "whole" / result.name)
                              if "eval_loss" in line and line["step"] == rung)
            for result in results.members if result.steps >= rung
        }  # fmt: skip
        out = [
            name for name in held_out if (place / "two" / name).exists() and results_of(results, name).stopped == rung
        ]
        assert max(held_out[name] for name in held_out if name not in out) <= min(held_out[name] for name in out)
    assert [row.run for row in read_rows([str(place / "two")])] == [
        str(place / "two" / result.name) for result in results.members if not result.stopped
    ]
    with pytest.raises(SboraxError, match="halving has stopped it after step 3; leave it out"):
        read_rows([str(place / "two" / next(result.name for result in results.members if result.stopped == 3))])


def results_of(results, name):
    return next(result for result in results.members if result.name == name)


@pytest.mark.nightly
@pytest.mark.parametrize("moment", [1, 3, 5])
def test_halving_resumes_to_the_same_bits(halved, places, tmp_path, moment):
    """Stopped in a program before the first rung, in one after it, and in the last one."""
    place, results, _ = halved
    begun, sent = [], []

    def stop(text):
        begun.extend([text] if text == "compiling" else [])
        # A second signal would end this process.
        if re.match(r"step \d/", text) and len(begun) == moment and not sent:
            sent.append(text)
            os.kill(os.getpid(), signal.SIGTERM)

    description = Sweep(mixed(places, steps=9), GRID, halving=(3, 6))
    cut = sweep(description, tmp_path / "cut", echo=stop)
    assert not cut.finished
    lines = []
    assert sweep(description, tmp_path / "cut", resume=True, echo=lines.append).members == results.members
    for result in results.members:
        assert losses(tmp_path / "cut" / result.name) == losses(place / "two" / result.name)
        if not result.stopped:
            leaves = [
                (folder / result.name / "adapter" / LEAVES).read_bytes() for folder in (place / "two", tmp_path / "cut")
            ]
            assert leaves[0] == leaves[1]
    initial = content(tmp_path / "cut")
    assert sweep(description, tmp_path / "cut", resume=True, echo=quiet).members == results.members
    assert content(tmp_path / "cut") == initial
    with pytest.raises(SboraxError, match="holds a sweep with halving at 3,6; resume it in the same way"):
        sweep(dataclasses.replace(description, halving=(2,)), tmp_path / "cut", resume=True, echo=quiet)


# Learning rates


def test_the_next_rate_lies_beyond_the_best():
    assert extension(sensitivity({1e-3: 1.0, 3e-3: 2.0}, lower=True)) == 3e-4
    assert extension(sensitivity({1e-3: 3.0, 3e-3: 2.0}, lower=True)) == 1e-2
    assert extension(sensitivity({1e-3: 3.0, 3e-3: 2.0, 1e-2: 5.0}, lower=True)) is None
    assert extension(Sensitivity((1e-3, 3e-3), (float("inf"),) * 2, None, False)) is None


def add_all(description, loss):
    """All members of a sweep with "auto", if `loss` of a member is its loss."""
    members = description.members()
    while added := description.extended(members, {member.name: loss(member) for member in members}):
        members += added
    return members


def test_rates_are_added_until_the_best_is_interior():
    grid = {"optimizer.lr": ("auto",), "seed_adapter": (0, 1), "batch_size": (1, 2)}

    def loss(member):
        best = {1: 1e-3, 2: 0.1}[member.experiment.batch_size]
        return abs(np.log(member.experiment.optimizer.lr / best)) + member.experiment.seed_adapter

    rates = {1: set(), 2: set()}
    for member in add_all(Sweep(PLAIN, grid), loss):
        rates[member.experiment.batch_size].add((member.experiment.optimizer.lr, member.experiment.seed_adapter))
    first, extra = {3e-4, 1e-3, 3e-3}, {1e-2, 3e-2, 0.1, 0.3}
    assert rates[1] == {(rate, seed) for rate in first for seed in (0, 1)}
    assert rates[2] == {(rate, seed) for rate in first | extra for seed in (0, 1)}
    names = [member.name for member in Sweep(PLAIN, {"optimizer.lr": (1e-4, 1e-3, "auto")}).members()]
    assert names == ["lr=0.0001", "lr=0.001"]
    endless = add_all(Sweep(PLAIN, {"optimizer.lr": ("auto",)}), lambda member: member.experiment.optimizer.lr)
    assert len(endless) == 3 + EXTENSIONS
    assert read_grid(["optimizer.lr=auto", "steps=2"]) == (["steps=2"], {"optimizer.lr": ("auto",)})


@pytest.mark.nightly
def test_a_sweep_with_added_rates_resumes_to_the_same_members(places, tmp_path, monkeypatch):
    description = Sweep(
        mixed(places, optimizer=sx.Optimizer(lr=1e-4, eps=1e-4)), {"optimizer.lr": (1e-4, 3e-4, "auto")}
    )
    monkeypatch.setattr("sborax.sweep.grid.EXTENSIONS", 2)
    lines = []
    results = sweep(description, tmp_path / "whole", echo=lines.append)
    assert results.finished and [result.program for result in results.members] == [1, 1, 2, 3]
    assert [result.name for result in results.members] == ["lr=0.0001", "lr=0.0003", "lr=0.001", "lr=0.003"]
    assert lines[-2] == "best learning rate 0.003, the highest that was tried, so not known to be the best"
    assert sum("more, since the best learning rate is at an end" in line for line in lines) == 2
    alone = sweep(Sweep(mixed(places), {"optimizer.lr": (1e-3, 3e-3)}), tmp_path / "two", echo=quiet)
    for result, twin in zip(results.members[2:], alone.members, strict=True):
        assert result.eval_loss == pytest.approx(twin.eval_loss, rel=1e-6)
    begun = []

    def stop(text):
        begun.extend([text] if text == "compiling" else [])
        if text.startswith("step 1/") and len(begun) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not sweep(description, tmp_path / "cut", echo=stop).finished
    assert sweep(description, tmp_path / "cut", resume=True, echo=quiet).members == results.members
    initial = content(tmp_path / "cut")
    assert sweep(description, tmp_path / "cut", resume=True, echo=quiet).members == results.members
    assert content(tmp_path / "cut") == initial


def test_members_that_a_search_has_added_train_on_the_same_data(places, tmp_path, monkeypatch):
    data = write_data(tmp_path / "data.jsonl")
    description = Sweep(
        mixed(places, data=sx.Data(str(data), template="{instruction}", answer=" {output}", max_length=32), steps=1),
        {"optimizer.lr": (1e-4, 3e-4, "auto")},
    )
    monkeypatch.setattr("sborax.sweep.grid.EXTENSIONS", 1)

    def more(text):
        if "more, since the best" in text:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sweep(description, tmp_path / "out", echo=more)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[1:]))
    with pytest.raises(SboraxError, match="the data of the run has changed since it began"):
        sweep(description, tmp_path / "out", resume=True, echo=quiet)
    data.write_text("".join(lines))
    assert sweep(description, tmp_path / "out", resume=True, echo=quiet).finished


WRONG = [
    (("optimizer.lr=1e-3,3e-3", "--halving", "100"), "halving: there is no rung at step 100, the run ends at 4"),
    (("optimizer.lr=1e-3,3e-3", "--halving", "3,2"), "halving: 3, 2: rungs are steps in ascending order"),
    (("optimizer.lr=1e-3,3e-3", "--halving", "x"), "--halving x: write steps in ascending order"),
    (("optimizer.lr=1e-3,3e-3", "--halving", "2", "eval.data=null"), "halving: needs held-out losses"),
    (("steps=2,4", "--halving", "1"), "halving: members make unequal numbers of steps"),
    (("optimizer.lr=auto", "--halving", "2"), "optimizer.lr=auto: tries rates one after the other"),
    (("optimizer.lr=1e-3,auto",), "optimizer.lr=1e-3,auto: one rate shows no direction to extend"),
    (("optimizer.lr=auto", "optimizer.lr=1,2"), "optimizer.lr: is given twice"),
    (("seed_adapter=auto,1",), "seed_adapter: must be a whole number"),
]


@pytest.mark.parametrize("words, problem", WRONG, ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_mistakes_are_one_line(places, tmp_path, capsys, words, problem):
    save_experiment(mixed(places), epath.Path(tmp_path))
    assert main(["sweep", str(tmp_path / "config.json"), "--out", str(tmp_path / "out"), *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(problem, line), line
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.nightly
def test_halving_and_rates_from_the_command_line(places, tmp_path, capsys):
    save_experiment(mixed(places, optimizer=sx.Optimizer(lr=1e-2, eps=1e-4), steps=2), epath.Path(tmp_path))
    config = str(tmp_path / "config.json")
    words = ["optimizer.lr=1e-3,1e-2", "--halving", "auto", "--out", str(tmp_path / "half")]
    assert main(["sweep", config, *words]) == 0
    assert "step 1: 1 of 2 stop: lr=1e-3" in capsys.readouterr().out.splitlines()
    assert main(["sweep", config, "optimizer.lr=auto", "--out", str(tmp_path / "auto")]) == 0
    assert "3 members: lr=0.003, lr=0.01, lr=0.03" in capsys.readouterr().out.splitlines()
