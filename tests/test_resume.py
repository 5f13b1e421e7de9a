"""Runs that are resumed when little or nothing is left to do: what a method or a procedure has made is not lost."""

import dataclasses
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cases import DENSE, PROCEDURES
from etils import epath
from nightly import nightly_unless
from safetensors import numpy
from tiny_model import write_data, write_model

import sborax as sx
from sborax import procedures
from sborax.evaluate.compare.rows import read_rows
from sborax.models.config import Experts
from sborax.procedures import AbstractProcedure
from sborax.records.lengths import read_lengths
from sborax.sweep.run import sweep
from sborax.train.experiment import save_experiment
from sborax.train.loop import train

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).resolve().parents[1]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEVENS = [DENSE[start : start + len(PROJECTIONS)] for start in range(0, len(DENSE), len(PROJECTIONS))]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model that every row of `cases` fits, a smaller one, and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    sizes = {"hidden_size": 192, "intermediate_size": 192, "head_dim": 32}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 6}
    wide, tiny = write_model(place / "wide", **sizes), write_model(place / "tiny")
    experts = Experts(count=4, chosen=2, intermediate_size=32)
    sparse = write_model(place / "sparse", model_type="mixtral", experts=experts)
    return {"wide": str(wide), "tiny": str(tiny), "sparse": str(sparse), "data": str(write_data(place / "data.jsonl"))}


def quiet(_):
    """Says nothing."""


RULES = [("mlp", sx.LoRA(rank=2))]


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
    contents = {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}
    return {name: content for name, content in contents.items() if not name.startswith("checkpoints/")}


def forget(run, *names):
    """Take parts of a run away."""
    for name in names:
        place = run / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()


def same_but_for_times(first, second):
    """Every file of two runs, bit for bit; what a step and a run took is left out."""
    timed = ("seconds", "compiled", "tokens_per_second", "memory", "peak_memory")

    def untimed(text):
        return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in text]

    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for name in first:
        if name == "metrics.jsonl":
            assert untimed(first[name].splitlines()) == untimed(second[name].splitlines())
        elif name == "summary.json":
            assert untimed([first[name]]) == untimed([second[name]])
        else:
            assert first[name] == second[name], name


def resumed_at_the_end(experiment, run):
    """Resumes a finished run, then as if it had died between its last checkpoint and its adapter."""
    summary, contents = train(experiment, run, echo=quiet), files(run)
    lines = []
    assert train(experiment, run, resume=True, echo=lines.append) == summary
    assert files(run) == contents and "already finished" in lines[-1]
    forget(run, "adapter", "summary.json")
    train(experiment, run, resume=True, echo=quiet)
    same_but_for_times(files(run), contents)


@pytest.mark.parametrize("name", nightly_unless([], PROCEDURES))
def test_a_procedure_loses_nothing_at_the_end_of_a_run(name, places, tmp_path):
    procedure, method = PROCEDURES[name]
    experiment = an_experiment(places, "tiny", [("self_attn|mlp", method)], procedure=procedure)
    run = tmp_path / "run"
    resumed_at_the_end(experiment, run)
    # Cut after a step at which nothing was done; the best adapter is sought anew from the same losses.
    contents = files(run)
    forget(run, "adapter", "summary.json", "best", *(f"checkpoints/{step}" for step in (6, 7)))
    train(experiment, run, resume=True, echo=quiet)
    same_but_for_times(files(run), contents)


@pytest.mark.parametrize(
    "cases", nightly_unless(SEVENS[:1], SEVENS), ids=lambda cases: f"{cases[0].name}..{cases[-1].name}"
)
def test_a_method_loses_nothing_at_the_end_of_a_run(cases, places, tmp_path):
    rules = [(module, case.method) for module, case in zip(PROJECTIONS, cases, strict=False)]
    resumed_at_the_end(an_experiment(places, "wide", rules, steps=2), tmp_path / "run")


@pytest.mark.nightly
def test_fewer_steps_than_were_made_are_refused_and_more_are_made(places, tmp_path):
    experiment = an_experiment(places, "tiny", [("mlp", sx.LoRA(rank=2))], steps=3)
    schedule = dataclasses.replace(experiment.optimizer, schedule="constant")
    experiment = dataclasses.replace(experiment, optimizer=schedule)
    train(experiment, tmp_path / "run", echo=quiet)
    contents = files(tmp_path / "run")
    short, long = (dataclasses.replace(experiment, steps=steps) for steps in (2, 4))
    with pytest.raises(sx.SboraxError, match="has made 3 steps, and is to make 2; give it 3 or more"):
        train(short, tmp_path / "run", resume=True, echo=quiet)
    assert files(tmp_path / "run") == contents
    assert train(long, tmp_path / "run", resume=True, echo=quiet).steps == 4
    # The summary is that of step 3 until the run has ended again.
    forget(tmp_path / "run", "checkpoints/4")
    (tmp_path / "run" / "summary.json").write_bytes(contents["summary.json"])
    final = files(tmp_path / "run")
    assert train(long, tmp_path / "run", resume=True, echo=quiet).steps == 4
    assert files(tmp_path / "run")["adapter/adapter.safetensors"] == final["adapter/adapter.safetensors"]


@pytest.mark.parametrize("start", [train, sweep], ids=["run", "sweep"])
def test_a_base_or_data_that_changed_under_its_name_is_refused(start, tmp_path):
    paths = {"tiny": str(write_model(tmp_path / "tiny")), "data": str(write_data(tmp_path / "data.jsonl"))}
    changes = {"optimizer": sx.Optimizer(lr=1e-2, schedule="constant"), "eval": sx.Eval(), "save": sx.Save()}
    rules = [("mlp", sx.LoRA(rank=2))]
    experiments = [an_experiment(paths, "tiny", rules, steps=steps, **changes) for steps in (1, 2)]
    first, longer = [sx.Sweep(item, {"seed_adapter": (0, 1)}) if start is sweep else item for item in experiments]
    run, data, base = tmp_path / "run", Path(paths["data"]), Path(paths["tiny"]) / "model.safetensors"
    start(first, run, echo=quiet)
    for place, change in ((data, _without_a_record), (base, _scaled)):
        content = place.read_bytes()
        change(place)
        with pytest.raises(sx.SboraxError, match=f"the {'data' if place == data else 'base'} of the run has changed"):
            start(longer, run, resume=True, echo=quiet)
        # A run that has nothing left to do reads neither again.
        start(first, run, resume=True, echo=quiet)
        place.write_bytes(content)
    assert start(longer, run, resume=True, echo=quiet)


@pytest.mark.parametrize("start", [train, sweep], ids=["run", "sweep"])
def test_held_out_data_that_changed_under_its_name_is_refused(start, places, tmp_path):
    data = write_data(tmp_path / "data.jsonl")
    held_out = dataclasses.replace(an_experiment(places, "tiny", RULES).data, name=str(data))
    changes = {"optimizer": sx.Optimizer(lr=1e-2, schedule="constant"), "save": sx.Save()}
    rules, measured = [("mlp", sx.LoRA(rank=2))], sx.Eval(data=held_out)
    experiments = [an_experiment(places, "tiny", rules, steps=steps, eval=measured, **changes) for steps in (1, 2)]
    first, longer = [sx.Sweep(item, {"seed_adapter": (0, 1)}) if start is sweep else item for item in experiments]
    start(first, tmp_path / "run", echo=quiet)
    content = data.read_bytes()
    _without_a_record(data)
    with pytest.raises(sx.SboraxError, match="the held-out data of the run has changed since it began"):
        start(longer, tmp_path / "run", resume=True, echo=quiet)
    if start is train:
        # Data of another name may be measured from now on.
        other = sx.Eval(data=dataclasses.replace(held_out, limit=2))
        assert start(dataclasses.replace(longer, eval=other), tmp_path / "run", resume=True, echo=quiet).finished
    else:
        data.write_bytes(content)
        assert start(longer, tmp_path / "run", resume=True, echo=quiet).finished


def test_adapters_of_another_config_are_not_taken_over(places, tmp_path):
    """A run may have a best adapter before its first checkpoint."""
    changes = {
        "save": sx.Save(every=100, best=True),
        "eval": sx.Eval(an_experiment(places, "tiny", RULES).data, every=1),
    }
    experiment = an_experiment(places, "tiny", [("mlp", sx.LoRA(rank=2))], steps=3, **changes)
    train(experiment, tmp_path / "run", echo=quiet)
    forget(tmp_path / "run", "checkpoints", "adapter", "summary.json")
    other = dataclasses.replace(experiment, rules=[("mlp", sx.LoRA(rank=4))])
    with pytest.raises(sx.SboraxError, match="rules differs from the run to resume"):
        train(other, tmp_path / "run", resume=True, echo=quiet)
    best = files(tmp_path / "run" / "best")
    assert train(experiment, tmp_path / "run", resume=True, echo=quiet).finished
    assert files(tmp_path / "run" / "best") == best


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_longer_run_tells_and_records_that_its_first_steps_had_other_rates(schedule, places, tmp_path):
    optimizer = sx.Optimizer(lr=1e-2, schedule=schedule, warmup=0)
    changes = {"optimizer": optimizer, "eval": sx.Eval(an_experiment(places, "tiny", RULES).data), "save": sx.Save()}
    experiment = an_experiment(places, "tiny", [("mlp", sx.LoRA(rank=2))], steps=2, **changes)
    train(experiment, tmp_path / "run", echo=quiet)
    lines, longer = [], dataclasses.replace(experiment, steps=4, eval=sx.Eval())
    summary = train(longer, tmp_path / "run", resume=True, echo=lines.append)
    told = [line for line in lines if "steps 1 to 2 had the learning rates of a run of 2, so a run of 4" in line]
    assert len(told) == (schedule == "linear")
    # The held-out loss of step 2 is not that of the end.
    assert summary.steps == 4 and summary.eval_loss is None
    assert read_lengths(epath.Path(tmp_path / "run")) == ({0: 2, 2: 4} if schedule == "linear" else {})
    longest = dataclasses.replace(longer, steps=5)

    def killed(line):
        if line == "compiling":
            raise KeyboardInterrupt

    # A run that ends before it has made another step leaves no length behind.
    for another in (dataclasses.replace(longer, steps=8), longest):
        with pytest.raises(KeyboardInterrupt):
            train(another, tmp_path / "run", resume=True, echo=killed)
    assert read_lengths(epath.Path(tmp_path / "run")) == ({0: 2, 2: 4, 4: 5} if schedule == "linear" else {})
    train(longest, tmp_path / "run", resume=True, echo=quiet)
    (row,) = read_rows([str(tmp_path / "run")])
    words = "2 after step 0, then 4 after step 2, then 5 after step 4"
    assert row.lengths == (words if schedule == "linear" else "")
    forget(tmp_path / "run", "checkpoints", "adapter", "summary.json")
    train(longest, tmp_path / "run", resume=True, echo=quiet)
    assert not read_lengths(epath.Path(tmp_path / "run"))


def _without_a_record(place):
    place.write_text("".join(place.read_text().splitlines(keepends=True)[1:]))


def _scaled(place):
    numpy.save_file({name: 2 * leaf for name, leaf in numpy.load_file(place).items()}, place)


def test_every_procedure_has_a_row():
    kinds = [getattr(procedures, name) for name in procedures.__all__]
    concrete = {kind for kind in kinds if issubclass(kind, AbstractProcedure) and not inspect.isabstract(kind)}
    assert concrete == {type(procedure) for procedure, _ in PROCEDURES.values()}


# A process that is killed

CHILD = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
import sborax as sx
from sborax.train.loop import train
mode, *places = sys.argv[1:]
for config, out in zip(places[::2], places[1::2], strict=True):
    train(sx.load_experiment(config), out, resume=mode == "resume")
"""


def child(cache, mode, *places):
    """A process that trains the experiments of `places`, each a config and a run directory, one after the other."""
    names = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", CHILD, mode, *map(str, places)]
    return subprocess.Popen(
        command, env={**os.environ, **names}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def output(process):
    """What a process said that has come to its end."""
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    return text


@pytest.mark.nightly
def test_kill_9_then_resume_ends_with_the_same_bits(places, tmp_path):
    """Every procedure, and adapters of experts beside a router that is trained, also on a mesh."""
    moments, cache, configs = random.Random(9), tmp_path / "cache", {}
    runs: dict[str, tuple[str, Any, dict[str, Any]]] = {
        name: ("tiny", [("self_attn|mlp", method)], {"procedure": procedure})
        for name, (procedure, method) in PROCEDURES.items()
    }
    on_experts = [("experts", sx.LoRA(rank=2))]
    runs["experts"] = ("sparse", on_experts, {"train_also": ("router",)})
    runs["experts on a mesh"] = (
        "sparse",
        on_experts,
        {"train_also": ("router",), "batch_size": 4, "mesh": {"expert": 2, "fsdp": 2}},
    )
    for name, (model, rules, changes) in runs.items():
        save = sx.Save(every=2, keep=3)
        experiment = an_experiment(places, model, rules, steps=24, save=save, eval=sx.Eval(), **changes)
        (tmp_path / name).mkdir()
        save_experiment(experiment, epath.Path(tmp_path / name))
        configs[tmp_path / name] = tmp_path / name / "config.json"

    def all_in(out):
        return [part for place, config in configs.items() for part in (config, place / out)]

    output(child(cache, "new", *all_in("whole")))
    for place, config in configs.items():
        process = child(cache, "new", config, place / "cut")
        file, lines, deadline = place / "cut" / "metrics.jsonl", moments.randint(5, 14), time.monotonic() + 600
        while not (file.exists() and len(file.read_text().splitlines()) >= lines):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.002)
        # Anything may be going on then: a step, a merge, a segment or a checkpoint being written.
        time.sleep(moments.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
        assert not (place / "cut" / "adapter").exists(), f"the run had ended before step {lines} was seen"
    text = output(child(cache, "resume", *all_in("cut")))
    assert text.count("resuming after step") == len(configs)
    for place in configs:
        same_but_for_times(files(place / "cut"), files(place / "whole"))
