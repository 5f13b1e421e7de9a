"""Sweeps with a procedure between their steps: every member is its own single run."""

import collections
import os
import signal

import pytest
from nightly import nightly_unless

import sborax as sx
from sborax.procedures import COLA, AdaLoRABudget, LoRAPrune, PRILoRAPruning, XGBLoRA
from sborax.records.adapter import LEAVES
from sborax.sweep import run as module
from sborax.sweep import stepper as sweep_stepper
from sborax.sweep.grid import Sweep
from sborax.sweep.members import make_sweep_step
from sborax.sweep.run import sweep
from sborax.train.loop import train
from sborax.train.read import read_model
from tests.test_sweep import an_experiment, metrics, quiet, same_run
from tests.tiny_model import write_data, write_model

GRID = {"optimizer.lr": (1e-3, 1e-2), "seed_adapter": (0, 1)}
RUNS = {
    "COLA": (COLA(every=2), sx.SBoRA(rank=4)),
    "COLA-ranks": (COLA(every=2, ranks=(4, 2)), sx.LoRA(rank=4)),
    "COLA in 4 bits": (COLA(every=3, requantise=True), sx.LoRA(rank=2)),
    "XGBLoRA": (XGBLoRA(every=2, layers=1, penalty=0.01), sx.LoRA(rank=1, dropout=0.1)),
    "LoRAPrune": (LoRAPrune(warmup=0.0, cooldown=0.3, every=1, protect=0.0), sx.LoRA(rank=2)),
    "LoRAPrune-grad": (LoRAPrune(warmup=0.0, cooldown=0.3, every=1, protect=0.0, metric="grad"), sx.LoRA(rank=2)),
    "AdaLoRABudget": (AdaLoRABudget(target=2, warmup=1, cooldown=1, every=2), sx.AdaLoRA(rank=4)),
    "PRILoRAPruning": (PRILoRAPruning(every=2), sx.PRILoRA(rank=sx.LinearRanks(2, 4), persistent_mask=True)),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model whose kernels can be held in 4 bits, and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    model = write_model(place / "model", hidden_size=64, intermediate_size=64, head_dim=16)
    return str(model), str(write_data(place / "data.jsonl"))


def with_procedure(name, places, **changes):
    procedure, method = RUNS[name]
    settings = {
        "rules": [("self_attn|mlp", method)],
        "procedure": procedure,
        "quant": "nf4" if "4 bits" in name else None,
        # With a small eps Adam turns rounding of tiny gradients into steps.
        "optimizer": sx.Optimizer(lr=1e-2, eps=1e-4, decay=0.01),
        "steps": 5,
    }
    return an_experiment(places, **(settings | changes))


# One after the other, by lax.map, or together, by vmap.
AT_ONCE = dict(zip(RUNS, (1, 4, 4, 1, 4, 4, 1, 4), strict=True))


@pytest.mark.nightly
@pytest.mark.parametrize("name", RUNS)
def test_a_member_is_its_own_single_run(name, places, tmp_path, monkeypatch):
    counts, steps = collections.Counter(), []

    def load(*args, **kwargs):
        counts["loads"] += 1
        return read_model(*args, **kwargs)

    def make(*args):
        steps.append(make_sweep_step(*args))
        return steps[-1]

    monkeypatch.setattr(module, "read_model", load)
    monkeypatch.setattr(sweep_stepper, "make_sweep_step", make)
    description = Sweep(with_procedure(name, places), GRID, AT_ONCE[name])
    assert sweep(description, tmp_path / "four", echo=quiet).finished
    assert counts["loads"] == 1 and [step._cache_size() for step in steps] == [1]
    member = description.members()[3]
    train(member.experiment, tmp_path / "alone", echo=quiet)
    same_run(tmp_path / "alone", tmp_path / "four" / member.name, atol=1e-6)
    contents = [(tmp_path / "four" / entry.name / "adapter" / LEAVES).read_bytes() for entry in description.members()]
    assert len(set(contents)) == 4


@pytest.mark.nightly
@pytest.mark.parametrize("name", nightly_unless(["COLA"], ["COLA", "LoRAPrune", "PRILoRAPruning"]))
def test_a_sweep_that_was_stopped_resumes_to_the_same_bits(name, places, tmp_path):
    # A member that diverges is left alone by the procedure, and by the resumed one.
    description = Sweep(with_procedure(name, places, save=sx.Save(every=100)), {"optimizer.lr": (1e-2, 1e17)})
    sweep(description, tmp_path / "whole", echo=quiet)

    def stop(text):
        if text.startswith("step 1/"):
            os.kill(os.getpid(), signal.SIGTERM)

    cut = sweep(description, tmp_path / "cut", echo=stop)
    assert not cut.finished and cut.members[0].steps < 5
    resumed = sweep(description, tmp_path / "cut", resume=True, echo=quiet)
    assert resumed.finished and [member.diverged for member in resumed.members] == [None, 2]
    good = description.members()[0].name
    contents = [(tmp_path / place / good / "adapter" / LEAVES).read_bytes() for place in ("whole", "cut")]
    assert contents[0] == contents[1] and len(metrics(tmp_path / "cut" / good)) == 5
