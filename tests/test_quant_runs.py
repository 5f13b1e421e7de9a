"""Quantised bases of runs: read tensor by tensor, equal to those quantised afterwards, and what methods see of them."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sborax_models import make
from tiny_gguf import write_gguf
from tiny_model import write_data, write_model

import sborax as sx
from sborax.adapters.tree import nodes, split
from sborax.cli.targets import load_run
from sborax.layout.state import flatten
from sborax.models import load_model
from sborax.models.nf4 import NF4Array, quantise
from sborax.train.base import adapt, quantise_base, rewritten
from sborax.train.loop import train
from sborax.train.read import read_held_out
from sborax.train.step import make_loss

ROOT = Path(__file__).resolve().parents[1]
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model whose kernels can be quantised, and data."""
    place = tmp_path_factory.mktemp("places")
    return str(write_model(place / "model", **WIDE)), str(write_data(place / "data.jsonl"))


@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_read_in_four_bits_is_read_and_then_quantised(places, dtype, scan):
    expected = quantise_base(load_model(places[0], dtype, scan=scan).params, "nf4")
    model = load_model(places[0], dtype, scan=scan, quant="nf4")
    chex.assert_trees_all_equal(model.params, expected)
    mixed = load_model(places[0], dtype, scan=scan, quant="nf4", keep=lambda path: "up_proj" in path)
    kinds = {path: isinstance(leaf, NF4Array) for path, leaf in flatten(mixed.params).items() if "layers" in path}
    assert kinds == {path: path.endswith("/kernel") and "up_proj" not in path for path in kinds}


def test_gguf_is_read_in_four_bits_too(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make("llama", tmp_path / "dense", **WIDE))
    expected = quantise_base(load_model(tmp_path / "tiny.gguf").params, "nf4")
    chex.assert_trees_all_equal(load_model(tmp_path / "tiny.gguf", quant="nf4").params, expected)


def test_what_cannot_be_quantised_is_named(tmp_path):
    with pytest.raises(sx.SboraxError, match="quant: layers/mlp/down_proj/kernel: NF4 cuts the input axis into blocks"):
        load_model(write_model(tmp_path / "odd", hidden_size=64, head_dim=16), quant="nf4")
    broken = write_model(tmp_path / "broken", **WIDE)
    file = broken / "model.safetensors"
    # The last values of the file belong to the second layer's projections.
    file.write_bytes(file.read_bytes()[:-1000] + np.full(250, np.nan, np.float32).tobytes())
    with pytest.raises(sx.SboraxError, match=r"quant: model\.layers\.\d.*: .*not finite"):
        load_model(broken, quant="nf4")


MEASURE = """
import re, sys, threading, time
import jax
jax.config.update("jax_platforms", "cpu")
from sborax.models import load_model
from sborax.train.base import quantise_base

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

small, large, mode = sys.argv[1:]
def load(place):
    if mode == "streamed":
        return load_model(place, quant="nf4").params
    return quantise_base(load_model(place).params, "nf4")
jax.block_until_ready(load(small))
before, most, over = held(), [0], threading.Event()

def watch():
    while not over.is_set():
        most[0] = max(most[0], held())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
params = jax.block_until_ready(load(large))
over.set()
thread.join()
print(max(most[0], held()) - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 170 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 5, "head_dim": 256}
    return write_model(tmp_path_factory.mktemp("large"), **sizes)


def growth(small, large, mode):
    """Bytes by which the memory grows while a model is read, and those of its parameters."""
    command = [sys.executable, "-c", MEASURE, small, str(large), mode]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr
    return [int(word) for word in process.stdout.split()]


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of anonymous memory")


@linux
def test_no_dense_model_is_ever_in_memory(places, large):
    size = (large / "model.safetensors").stat().st_size
    assert size > 170e6
    largest = 1024 * 2048 * 4
    grown, quantised = growth(places[0], large, "streamed")
    assert quantised < size / 7
    assert grown <= 1.3 * quantised + largest, (grown, quantised)


@pytest.mark.nightly
@linux
def test_a_dense_model_would_be_seen(places, large):
    assert growth(places[0], large, "dense")[0] > 0.9 * (large / "model.safetensors").stat().st_size


RULES = (
    sx.Rule("mlp/up", sx.chain(sx.PiSSA(rank=4), sx.DoRA())),
    sx.Rule("mlp/gate", sx.OLoRA(rank=4), layers=(0,)),
    sx.Rule("mlp/gate", sx.DoRA(rank=4)),
    sx.Rule("self_attn/(q|v)", sx.DoRA(rank=4)),
    sx.Rule("self_attn", sx.LoRA(rank=4)),
)


@pytest.mark.nightly
def test_norms_are_those_of_the_weight_that_is_stored(places):
    model = load_model(places[0], quant="nf4", keep=rewritten(RULES))
    dense = {path for path, leaf in flatten(model.params).items() if path.endswith("kernel") and hasattr(leaf, "at")}
    assert dense == {"layers/mlp/up_proj/kernel", "layers/mlp/gate_proj/kernel"}
    params, adapters = adapt(jax.random.key(0), model.params, sx.plan(model.params, RULES), "nf4")
    count = 0
    for path, node in nodes(adapters).items():
        stored = flatten(params)[path]
        assert isinstance(stored, NF4Array)
        norms = jnp.sum(jnp.square(stored.dense()), axis=-2)
        squares = node.frozen.get("w2")
        layers = slice(None)
        if "gate" in path:
            squares, layers = node.frozen["1"]["w2"], slice(1, None)
        if squares is not None:
            count += 1
            np.testing.assert_allclose(squares[layers], norms[layers], rtol=1e-6, err_msg=path)
    assert count == 4
    # Layers that the rewriting rule leaves alone are those of the dense weight, quantised once.
    gate = load_model(places[0]).params["layers"]["mlp"]["gate_proj"]["kernel"]
    layer = jax.tree.map(lambda leaf: leaf[1], flatten(params)["layers/mlp/gate_proj/kernel"])
    chex.assert_trees_all_equal(layer, quantise(gate[1]))
    # Factored and merged are one function.
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    want = model.apply(params, adapters, tokens)
    merged = jax.jit(model.apply)(sx.merge(params, adapters), None, tokens)
    np.testing.assert_allclose(merged, want, rtol=0, atol=2e-5 * float(jnp.abs(want).max()))


def test_a_run_in_four_bits_is_loaded_as_it_was_trained(places, tmp_path):
    data = sx.Data(places[1], template="{instruction}", answer=" {output}", max_length=32, buckets=(32,))
    experiment = sx.Experiment(
        model=places[0],
        data=data,
        rules=RULES,
        optimizer=sx.Optimizer(lr=1e-2),
        steps=6,
        quant="nf4",
        eval=sx.Eval(data=dataclasses.replace(data, limit=6)),
    )
    summary = train(experiment, tmp_path / "run", echo=lambda _: None)
    assert summary.last_loss < summary.first_loss
    target = load_run(str(tmp_path / "run"))
    flat = flatten(target.params)
    assert all(isinstance(flat[path], NF4Array) for path in flat if path.startswith("layers") and "kernel" in path)
    halves, total, tokens = split(target.adapters), 0.0, 0.0
    for batch in read_held_out(experiment, target.model, lambda _: None):
        part, counted = make_loss(target.model)({"adapters": halves[0], "base": {}}, halves[1], flat, batch)
        total, tokens = total + float(part), tokens + float(counted)
    assert total / tokens == pytest.approx(summary.eval_loss, rel=1e-6)
