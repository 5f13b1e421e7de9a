"""Runs that are resumed when little or nothing is left to do: what a method or a procedure has made is not lost."""

import dataclasses
import json
import shutil

import pytest
from cases import METHODS, PROCEDURES
from tiny_model import write_data, write_model

import sborax as sx
from sborax import procedures
from sborax.procedures import AbstractProcedure
from sborax.train.loop import train

pytestmark = pytest.mark.usefixtures("compiled_once")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEVENS = [METHODS[start : start + len(PROJECTIONS)] for start in range(0, len(METHODS), len(PROJECTIONS))]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model that every row of `cases` fits, a smaller one, and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 4}
    wide, tiny = write_model(place / "wide", **sizes), write_model(place / "tiny")
    return {"wide": str(wide), "tiny": str(tiny), "data": str(write_data(place / "data.jsonl"))}


def quiet(_):
    """Says nothing."""


def an_experiment(places, model, rules, **changes):
    data = sx.Data(places["data"], template="{instruction}", answer=" {output}", max_length=32, buckets=(32,))
    settings = {
        "model": places[model],
        "data": data,
        "rules": rules,
        "optimizer": sx.Optimizer(lr=1e-2),
        "steps": 7,
        "batch_size": 2,
        "save": sx.Save(every=1, keep=20, best=True),
        "eval": sx.Eval(data=dataclasses.replace(data, limit=4), every=6),
    }
    return sx.Experiment(**(settings | changes))


def files(run):
    """The content of every file of a run, checkpoints left out."""
    found = {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}
    return {name: content for name, content in found.items() if not name.startswith("checkpoints/")}


def forget(run, *names):
    """Take parts of a run away."""
    for name in names:
        place = run / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()


def same_but_for_times(one, other):
    """Every file of two runs, bit for bit; what a step and a run took is left out."""
    timed = ("seconds", "compiled", "tokens_per_second", "memory", "peak_memory")

    def untimed(text):
        return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in text]

    assert one.keys() == other.keys()
    for name in one:
        if name == "metrics.jsonl":
            assert untimed(one[name].splitlines()) == untimed(other[name].splitlines())
        elif name == "summary.json":
            assert untimed([one[name]]) == untimed([other[name]])
        else:
            assert one[name] == other[name], name


def resumed_at_the_end(experiment, run):
    """Resumes a finished run, then as if it had died between its last checkpoint and its adapter."""
    summary, before = train(experiment, run, echo=quiet), files(run)
    said = []
    assert train(experiment, run, resume=True, echo=said.append) == summary
    assert files(run) == before and "already finished" in said[-1]
    forget(run, "adapter", "summary.json")
    train(experiment, run, resume=True, echo=quiet)
    same_but_for_times(files(run), before)


@pytest.mark.parametrize("name", PROCEDURES)
def test_a_procedure_loses_nothing_at_the_end_of_a_run(name, places, tmp_path):
    procedure, method = PROCEDURES[name]
    experiment = an_experiment(places, "tiny", [("self_attn|mlp", method)], procedure=procedure)
    run = tmp_path / "run"
    resumed_at_the_end(experiment, run)
    # Cut after a step at which nothing was done; the best adapter is sought anew from the same losses.
    before = files(run)
    forget(run, "adapter", "summary.json", "best", *(f"checkpoints/{step}" for step in (6, 7)))
    train(experiment, run, resume=True, echo=quiet)
    same_but_for_times(files(run), before)


@pytest.mark.parametrize("cases", SEVENS, ids=lambda cases: f"{cases[0].name}..{cases[-1].name}")
def test_a_method_loses_nothing_at_the_end_of_a_run(cases, places, tmp_path):
    rules = [(module, case.method) for module, case in zip(PROJECTIONS, cases, strict=False)]
    resumed_at_the_end(an_experiment(places, "wide", rules, steps=2), tmp_path / "run")


def test_every_procedure_has_a_row():
    known = [getattr(procedures, name) for name in procedures.__all__]
    concrete = {one for one in known if issubclass(one, AbstractProcedure) and one is not AbstractProcedure}
    assert concrete == {type(procedure) for procedure, _ in PROCEDURES.values()}
