"""Procedures on a mesh: the numbers of one device, everything where it lay, the same bits after a crash."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from nightly import nightly_unless
from tiny_model import write_data, write_model

import sborax as sx
from sborax.layout.sharding import parts_shardings, state_shardings
from sborax.models import load_config
from sborax.procedures import COLA, AdaLoRABudget, LoRAPrune, PRILoRAPruning, XGBLoRA
from sborax.records.adapter import LEAVES
from sborax.train import prepare as module
from sborax.train.active import ActiveProcedure
from sborax.train.loop import train
from sborax.train.step import make_step

STEPS, CUT = 20, 13
RUNS = {
    "COLA": (COLA(every=6), sx.SBoRA(rank=4)),
    "COLA-ranks": (COLA(every=6, ranks=(3, 1)), sx.LoRA(rank=3)),
    "COLA in 4 bits": (COLA(every=8, requantise=True), sx.LoRA(rank=2)),
    "XGBLoRA": (XGBLoRA(every=4, layers=1, penalty=0.01), sx.LoRA(rank=1)),
    "LoRAPrune": (LoRAPrune(warmup=0.0, cooldown=0.3, every=3, protect=0.0), sx.LoRA(rank=2)),
    "LoRAPrune-grad": (LoRAPrune(warmup=0.0, cooldown=0.3, every=3, protect=0.0, metric="grad"), sx.LoRA(rank=2)),
    "AdaLoRABudget": (AdaLoRABudget(target=2, warmup=2, cooldown=4, every=3), sx.AdaLoRA(rank=4)),
    "PRILoRAPruning": (PRILoRAPruning(every=6), sx.PRILoRA(rank=sx.LinearRanks(2, 4), persistent_mask=True)),
}
MESHES = [{"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model that can be cut into four, and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    model = write_model(place / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    return str(model), str(write_data(place / "data.jsonl", rows=48))


def an_experiment(name, places, **changes):
    procedure, method = RUNS[name]
    settings = {
        "model": places[0],
        "data": sx.Data(places[1], template="{instruction}", answer=" {output}", max_length=32, buckets=(32,)),
        "rules": [("self_attn|mlp", method)],
        # With a small eps Adam turns rounding of tiny gradients into steps.
        "optimizer": sx.Optimizer(lr=1e-3, eps=1e-4, warmup=0, schedule="constant"),
        "procedure": procedure,
        "quant": "nf4" if "4 bits" in name else None,
        "steps": STEPS,
        "batch_size": 8,
        "save": sx.Save(every=CUT),
    }
    return sx.Experiment(**(settings | changes))


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def quiet(_):
    """Says nothing."""


@pytest.fixture(scope="module")
def run_of(places, tmp_path_factory):
    """The directory of a run by name and mesh, made when it is first asked for."""
    runs = {}

    def run(name, sizes=None):
        key = name, str(sizes)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("runs") / "run"
            train(an_experiment(name, places, mesh=sizes), runs[key], echo=quiet)
        return runs[key]

    return run


def check_places(layout, config, state, parts):
    """Every leaf of the state and of the constant parts lies where it did before the first step."""
    trained = dataclasses.replace(parts, adapters=state.train["adapters"], trained_base=state.train["base"])
    shardings = parts_shardings(layout.mesh, config, trained)
    for tree, sharding in (
        (parts.frozen, shardings.frozen),
        (parts.base, shardings.base),
        (state.train, shardings.train),
    ):
        jax.tree.map(lambda leaf, where: check_place(leaf, where), tree, sharding)
    shardings = state_shardings(layout.mesh, state)
    jax.tree.map(lambda leaf, where: check_place(leaf, where), state, shardings)


def check_place(leaf, where):
    assert leaf.sharding.is_equivalent_to(where, leaf.ndim), f"{leaf.shape}: {leaf.sharding} is not {where}"


@pytest.fixture
def watched(monkeypatch, places):
    """The compiled steps that are made, with every act of a procedure looked at."""
    steps, acts, apply = [], [], ActiveProcedure.apply

    def make(*arguments):
        steps.append(make_step(*arguments))
        return steps[-1]

    def look(self, step, state, parts, tx):
        state, parts = apply(self, step, state, parts, tx)
        if self.layout.mesh is not None:
            check_places(self.layout, load_config(places[0]), state, parts)
        acts.append(step)
        return state, parts

    monkeypatch.setattr(module, "make_step", make)
    monkeypatch.setattr(ActiveProcedure, "apply", look)
    return steps, acts


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: " ".join(f"{k}{v}" for k, v in sizes.items()))
@pytest.mark.parametrize("name", RUNS)
def test_a_procedure_on_a_mesh_trains_as_on_one_device(name, sizes, run_of, watched):
    steps, acts = watched
    run = run_of(name, sizes)
    assert len(acts) >= 2
    assert [step._cache_size() for step in steps] == [1]
    np.testing.assert_allclose(losses(run), losses(run_of(name)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", nightly_unless([], RUNS))
def test_a_run_on_a_mesh_resumes_there_to_the_same_bits_and_elsewhere_to_the_same_losses(
    name, places, run_of, tmp_path
):
    reference = run_of(name, MESHES[-1])
    for place, mesh in (("there", MESHES[-1]), ("alone", None)):
        shutil.copytree(reference, tmp_path / place)
        shutil.rmtree(tmp_path / place / "checkpoints" / str(STEPS))
        shutil.rmtree(tmp_path / place / "adapter")
        lines = []
        train(an_experiment(name, places, mesh=mesh), tmp_path / place, resume=True, echo=lines.append)
        assert f"resuming after step {CUT}" in lines
    assert (tmp_path / "there" / "adapter" / LEAVES).read_bytes() == (reference / "adapter" / LEAVES).read_bytes()
    assert losses(tmp_path / "there") == losses(reference)
    np.testing.assert_allclose(losses(tmp_path / "alone"), losses(reference), rtol=0, atol=1e-5)
