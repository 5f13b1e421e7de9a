"""What a run tells of its steps, and where."""

import contextlib
import dataclasses
import json
import math
import struct
import sys

import jax
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto.event_pb2 import Event

import sborax as sx
from sborax.cli import main
from sborax.layout.state import take_apart
from sborax.models import load_model
from sborax.records.trace import make_trace
from sborax.train.experiment import save_experiment
from sborax.train.figures import PEAKS, label, model_flops
from sborax.train.log import open_logs
from sborax.train.loop import train
from tests.tiny_model import write_data, write_model

pytestmark = pytest.mark.usefixtures("compiled_once")

RATE = 0.05
RULES = (("mlp", sx.LoRA(rank=4)), ("q_proj", sx.SBoRA(rank=4)), ("v_proj", sx.SBoRA(rank=2)))


def quiet(_):
    """Says nothing."""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    place = tmp_path_factory.mktemp("places")
    name = str(write_data(place / "data.jsonl", rows=8))
    return sx.Experiment(
        model=str(write_model(place / "model")),
        data=sx.Data(name, template="{instruction}", answer=" {output}", max_length=32, buckets=(32,)),
        rules=RULES,
        optimizer=sx.Optimizer(name="sgd", lr=RATE, clip=None, schedule="constant", warmup=0, betas=(0.0, 0.0)),
        train_also=("norm",),
        steps=6,
        batch_size=2,
    )


@pytest.fixture(scope="module")
def lines(experiment, tmp_path_factory):
    """A run on a device whose peak is known, with a trace."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEAKS, jax.devices()[0].device_kind, 1e-3)
        train(experiment, out, echo=quiet, profile=True)
    return out, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_norms_are_told_by_method_and_add_up(lines):
    for line in lines[1]:
        assert set(line["methods"]) == {"LoRA", "SBoRA", "base"}
        for name in ("grad_norm", "update_norm"):
            assert math.hypot(*(row[name] for row in line["methods"].values())) == pytest.approx(line[name], rel=1e-5)
        for row in (line, *line["methods"].values()):
            assert row["update_norm"] == pytest.approx(RATE * row["grad_norm"], rel=1e-5)
        assert line["methods"]["SBoRA"]["grad_norm"] == pytest.approx(
            math.hypot(*(norm for path, norm in line["grad_norms"].items() if "_proj" in path and "self_attn" in path))
        )


def test_speed_utilisation_and_memory(experiment, lines):
    model = load_model(experiment.model)
    parts = take_apart(*sx.attach(jax.random.key(0), model.params, RULES), train_also=("norm",))
    flops = model_flops(model.config, parts)
    for line in lines[1]:
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["seconds"], rel=0.1)
        assert line["utilisation"] == pytest.approx(line["tokens_per_second"] * flops / 1e9, abs=1e-4)
        assert line["memory"] > 2**20
    assert [line["compiled"] for line in lines[1]] == [True] + [False] * 5


def test_the_models_flops_are_4n_and_6n(experiment):
    model = load_model(experiment.model)
    d, ffn, layers, vocab = 32, 48, 2, 258
    n = layers * (d * 32 + 2 * d * 16 + 32 * d + 3 * d * ffn) + d * vocab
    parts = take_apart(*sx.attach(jax.random.key(0), model.params, RULES))
    assert model_flops(model.config, parts) == 4 * n
    assert model_flops(model.config, take_apart(model.params, {}, train_base=True)) == 6 * n


def test_methods_made_of_methods_are_told_apart():
    assert label(sx.LoRA()) == "LoRA"
    assert (
        label(sx.add(sx.LoRA(rank=2), sx.scale(sx.SBoRA(rank=2), 0.5), sx.LoRA(rank=3))) == "Sum(LoRA, Scaled(SBoRA))"
    )


def test_no_peak_is_invented(experiment, tmp_path):
    assert jax.devices()[0].device_kind not in PEAKS
    train(dataclasses.replace(experiment, steps=1), tmp_path / "run", echo=quiet)
    assert "utilisation" not in json.loads((tmp_path / "run" / "metrics.jsonl").read_text())


def test_a_trace_for_xprof(lines):
    (trace,) = (lines[0] / "profile").rglob("*.xplane.pb")
    assert b"jit_step" in trace.read_bytes()
    with pytest.raises(sx.SboraxError, match="--profile: skips 2 steps for compilation, and only 2 are left to make"):
        make_trace(epath.Path("run"), 4, 6)


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_log_that_is_not_installed(name, package, experiment, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(sx.SboraxError, match=rf"log: {name} needs a package .*; pip install 'sborax\[{name}\]'"):
        train(dataclasses.replace(experiment, log=(name,)), tmp_path / "run", echo=quiet)
    assert not (tmp_path / "run").exists()


def events(file, event):
    """The records of an event file."""
    content, place = file.read_bytes(), 0
    while place < len(content):
        (length,) = struct.unpack("<Q", content[place : place + 8])
        yield event.FromString(content[place + 12 : place + 12 + length])
        place += length + 16


def test_tensorboard_gets_every_number(experiment, tmp_path):
    short = dataclasses.replace(experiment, steps=2, log=("tensorboard",))
    train(short, tmp_path / "run", echo=quiet)
    train(dataclasses.replace(short, steps=3), tmp_path / "run", resume=True, echo=quiet)
    scalars, restarts = {}, []
    for file in (tmp_path / "run" / "tensorboard").iterdir():
        for event in events(file, Event):
            restarts += [event.step] if event.HasField("session_log") else []
            scalars |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    assert restarts == [3]
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        assert scalars[line["step"], "loss"] == pytest.approx(line["loss"], rel=1e-6)
        norm = line["methods"]["SBoRA"]["update_norm"]
        assert scalars[line["step"], "methods/SBoRA/update_norm"] == pytest.approx(norm, rel=1e-6)


def test_weights_and_biases_offline(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    short = dataclasses.replace(experiment, steps=2, log=("wandb",))
    train(short, tmp_path / "run", echo=quiet)
    name = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    (file,) = (tmp_path / "run" / "wandb").rglob(f"run-{name}.wandb")
    content = file.read_bytes()
    assert b"methods/SBoRA/update_norm" in content and b"tokens_per_second" in content


def test_members_of_a_sweep_are_runs_of_their_own_in_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    experiment = sx.Experiment("m", sx.Data("d"), [("mlp", sx.LoRA(rank=2))], steps=1, log=("wandb",))
    runs = [epath.Path(tmp_path) / name for name in ("one", "two")]
    with contextlib.ExitStack() as ends:
        for run in runs:
            run.mkdir()
        logs = [open_logs(experiment, run, 0, ends)[0] for run in runs]
        assert [log.run.name for log in logs] == ["one", "two"]
    assert len({(run / "wandb.json").read_text() for run in runs}) == 2


@pytest.fixture
def other_programs():
    """The folder of compiled programs as it was before."""
    folder = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


def test_programs_are_kept_in_a_folder(experiment, tmp_path, other_programs):
    save_experiment(dataclasses.replace(experiment, steps=1), epath.Path(tmp_path))
    command = ["train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]
    assert main([*command, "--compile-cache", str(tmp_path / "programs")]) == 0
    assert any(file.name.startswith("jit_step") for file in (tmp_path / "programs").iterdir())
