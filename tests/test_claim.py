"""The directory of a run: one process at a time, and nothing left of a start that failed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import optax
import pytest
from etils import epath
from tiny_model import write_data, write_model

import sborax as sx
from sborax.adapters.core import SboraxError
from sborax.cli import main
from sborax.records.claim import LOCK, locked
from sborax.train.loop import train

HOLD = """
import sys, time
from etils import epath
from sborax.records.claim import locked

with locked(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model and data."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "model")
    write_data(folder / "data.jsonl")
    return folder


def an_experiment(place: Path, **changes) -> sx.Experiment:
    return sx.Experiment(
        **{
            "model": str(place / "model"),
            "data": sx.Data(str(place / "data.jsonl"), template="chat", max_length=96),
            "rules": (("q_proj", sx.LoRA(rank=4)),),
            "optimizer": sx.Optimizer(lr=1e-2, schedule="constant", warmup=0),
            "steps": 2,
            "batch_size": 2,
            "save": sx.Save(every=1),
            **changes,
        }
    )


def quiet(text: str) -> None:
    pass


@pytest.mark.nightly
def test_a_directory_is_held_by_one_process_until_it_is_gone(place, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(sx.__file__).parents[1])}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(SboraxError, match=f"in use by process {holder.pid} on .* since 20") as caught:
        train(an_experiment(place), run, echo=quiet)
    assert "\n" not in str(caught.value)
    with pytest.raises(SboraxError, match="in use"):
        train(an_experiment(place), run, resume=True, echo=quiet)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (run / LOCK).exists()
    assert train(an_experiment(place), run, resume=True, echo=quiet).finished
    assert not (run / LOCK).exists()


def test_a_lock_is_of_one_holder_within_a_process_too(tmp_path):
    place = epath.Path(tmp_path)
    with locked(place):
        with pytest.raises(SboraxError, match="in use"):
            with locked(place):
                pass
    with locked(place):
        pass
    assert not any(place.iterdir())


BROKEN = {
    "model": {"model": "/no/where"},
    "rank": {"rules": (("q_proj", sx.LoRA(rank=1000)),)},
    "pattern": {"rules": (("nowhere", sx.LoRA(rank=4)),)},
    "data": {"data": sx.Data("/no/where.jsonl")},
    "column": {"data": sx.Data("{data}", template="Q: {question}")},
    "length": {"data": sx.Data("{data}", template="chat", max_length=1000)},
    "loss": {"optimizer": sx.Optimizer(name="sgd", lr=1e38, schedule="constant", warmup=0, clip=None)},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_start_that_fails_leaves_room_for_the_corrected_one(place, tmp_path, name):
    changes = dict(BROKEN[name])
    if "data" in changes and changes["data"].name == "{data}":
        changes["data"] = sx.Data(
            str(place / "data.jsonl"), changes["data"].template, max_length=changes["data"].max_length
        )
    run, lines = tmp_path / "run", []
    with pytest.raises(SboraxError):
        train(an_experiment(place, **changes), run, echo=lines.append)
    assert not run.exists() or not any(run.iterdir())
    if name in ("model", "rank", "pattern", "data"):
        assert lines == []
    assert train(an_experiment(place, steps=1), run, echo=quiet).finished


def test_a_directory_with_files_of_others_is_refused_and_kept(place, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for resume, words in ((False, "not empty"), (True, "no config.json, so there is no run to resume")):
        with pytest.raises(SboraxError, match=words):
            train(an_experiment(place), tmp_path, resume=resume, echo=quiet)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_what_is_not_there_is_refused(place, tmp_path):
    with pytest.raises(SboraxError, match="there is no run to resume; leave --resume out"):
        train(an_experiment(place), tmp_path / "typo", resume=True, echo=quiet)
    assert not (tmp_path / "typo").exists()


def test_before_the_first_checkpoint_a_resumed_run_may_change(place, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"model": "m", "data": {"name": "d"}, "steps": 1, "train_base": True}))
    assert train(an_experiment(place, steps=1), run, resume=True, echo=quiet).finished
    with pytest.raises(SboraxError, match="rules differs"):
        train(an_experiment(place, rules=(("q_proj", sx.LoRA(rank=2)),)), run, resume=True, echo=quiet)


def test_what_was_given_in_python_trains_and_says_what_is_missing(place, tmp_path, capsys):
    records = [{"instruction": f"{a} plus {a}?", "output": f"{2 * a}."} for a in range(8)]
    data = sx.Data(records, template="chat", max_length=96)
    experiment = an_experiment(place, data=data, optimizer=optax.adam(1e-2), steps=1)
    run = tmp_path / "run"
    summary = train(experiment, run, echo=quiet)
    assert summary.finished and summary.samples.startswith("8 samples of 8 records")
    config = json.loads((run / "config.json").read_text())
    assert config["optimizer"] == {"given_in_python": "an optax transformation"}
    assert config["data"]["name"]["given_in_python"].startswith("8 records, sha256 ")
    for words in (["--out", str(run), "--resume"], ["--out", str(tmp_path / "again")]):
        assert main(["train", str(run / "config.json"), *words]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "optimizer: was given in Python (an optax transformation), which no config.json holds" in line
    changes = ['optimizer={"lr": 1e-2}', f"data.name={place / 'data.jsonl'}"]
    assert main(["train", str(run / "config.json"), *changes, "--out", str(tmp_path / "other")]) == 0
    assert main(["generate", str(run), "--prompt", "1 plus 1?", "--max-new-tokens", "1"]) == 0
    assert train(an_experiment(place, data=data, optimizer=optax.adam(1e-2)), run, resume=True, echo=quiet).finished
    with pytest.raises(SboraxError, match="data differs from the run to resume"):
        subset = sx.Data(records[1:], template="chat", max_length=96)
        train(an_experiment(place, data=subset, optimizer=optax.adam(1e-2)), run, resume=True, echo=quiet)


def test_an_optax_transformation_is_what_it_is(place, tmp_path):
    """Without clipping, a schedule or decay around it."""
    transformation = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.0))
    ours = sx.Optimizer(lr=1e-2, schedule="constant", warmup=0)
    losses = [train(an_experiment(place, optimizer=tx), tmp_path / name, echo=quiet).last_loss
              for name, tx in (("given", transformation), ("ours", ours))]  # fmt: skip
    assert losses[0] == losses[1]
