"""A run directory that an earlier version wrote (commit 4bf1f38) is read, scored and gone on with as its own.

`golden/earlier_run.zip` holds the directory of a run of four steps: SBoRA on attention, DoRA on OLoRA's factors on
`up_proj`, Bone on the rest, over `tiny_model.write_model`; and the logits that it had there.
"""

import json
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import write_data, write_model

import sborax as sx
from sborax.cli.targets import load_run
from sborax.train.loop import train

TOKENS = jnp.arange(2, 26, dtype=jnp.int32).reshape(2, 12)


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """The run directory, its model and its data beside it in the current directory."""
    monkeypatch.chdir(tmp_path)
    zipfile.ZipFile(Path(__file__).parent / "golden" / "earlier_run.zip").extractall(tmp_path)
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    return tmp_path / "run"


def test_its_adapter_computes_the_same(earlier):
    run = load_run("run")
    logits = run.model.apply(run.params, run.adapters, TOKENS)
    np.testing.assert_allclose(logits, np.load("logits.npy"), rtol=0, atol=1e-5)
    # Else any adapter would do.
    base = run.model.apply(sx.load_model("model").params, None, TOKENS)
    assert np.abs(np.asarray(base) - np.load("logits.npy")).max() > 1e-2


def test_it_goes_on(earlier):
    initial = (earlier / "metrics.jsonl").read_text().splitlines()
    experiment = sx.load_experiment("run", ["steps=6"])
    summary = train(experiment, earlier, resume=True, echo=lambda _: None)
    final = (earlier / "metrics.jsonl").read_text().splitlines()
    assert summary.finished and summary.steps == 6
    assert final[:4] == initial and [json.loads(line)["step"] for line in final] == [1, 2, 3, 4, 5, 6]
