"""Runs with methods that start from gradients: computed on the run's own data, kept for resumption."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from tiny_model import write_data, write_model

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.cli import main
from sborax.models import load_model
from sborax.records.adapter import LEAVES, load_adapter, read_adapter
from sborax.records.claim import START
from sborax.train.experiment import save_experiment
from sborax.train.hints import first_batches
from sborax.train.loop import train
from sborax.train.read import read_data

RULES = (
    sx.Rule("mlp/up", sx.LoRAGA(rank=4)),
    sx.Rule("self_attn/q", sx.LoRAGA(rank=2), layers=(1,)),
    sx.Rule("self_attn/(q|v)", sx.LoRA(rank=2, dropout=0.1)),
    sx.Rule("down", sx.chain(sx.LoRAGA(rank=2), sx.DoRA())),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model whose kernels can be quantised, and data with samples of very different lengths."""
    place = tmp_path_factory.mktemp("places")
    model = write_model(place / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    return str(model), str(write_data(place / "data.jsonl"))


def an_experiment(places, **changes):
    settings = {
        "model": places[0],
        "data": sx.Data(places[1], template="{instruction}", answer=" {output}", max_length=32),
        "rules": RULES,
        "optimizer": sx.Optimizer(lr=1e-2),
        "steps": 5,
        "batch_size": 2,
        "accumulate": 2,
        "save": sx.Save(every=1, keep=9),
        "hint_batches": 3,
    }
    return sx.Experiment(**(settings | changes))


def quiet(_):
    """Says nothing."""


@pytest.fixture(scope="module")
def run(places, tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("runs") / "whole", []
    return out, train(an_experiment(places), out, echo=lines.append), lines


def test_it_just_trains(run):
    _, summary, lines = run
    assert summary.finished and summary.last_loss < summary.first_loss
    gradients = [line for line in lines if line.startswith("gradient of")]
    assert gradients == [
        "gradient of layers/mlp/down_proj over 3 batches (1 of 3)",
        "gradient of layers/mlp/up_proj over 3 batches (2 of 3)",
        "gradient of layers/self_attn/q_proj over 3 batches (3 of 3)",
    ]


@pytest.mark.nightly
def test_the_start_is_that_of_the_gradient_of_the_data(run, places):
    """The same from the public verbs, with a loss written out."""
    out, experiment = run[0], an_experiment(places)
    model = load_model(places[0])
    batches, _ = read_data(experiment, model, quiet)
    parts = first_batches(batches, 3)
    assert [batch["tokens"].shape for batch in parts] == [(2, parts[0]["tokens"].shape[1])] * 3
    tokens = [batches[step]["tokens"] for step in (0, 1)]
    for number, batch in enumerate(parts):
        rows = tokens[number // 2][number % 2]
        np.testing.assert_array_equal(batch["tokens"][:, : rows.shape[1]], rows)
        assert not batch["counts"][:, rows.shape[1] :].any()

    def loss(params, batch):
        logits = model.apply(params, None, batch["tokens"], segment_ids=batch["segments"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["counts"]) / jnp.sum(batch["counts"])

    hints = sx.gradient_hints(loss, model.params, "mlp/|q_proj", parts)
    params, adapters = sx.attach(jax.random.key(0), model.params, RULES, hints)
    begun = nodes(read_adapter(out / START).adapters)
    assert set(begun) == {f"layers/{name}/kernel" for name in ("mlp/down_proj", "mlp/up_proj", "self_attn/q_proj")}
    for path, node in begun.items():
        # Signs of singular vectors are free, so products are compared.
        pairs = [(node.frozen, nodes(adapters)[path].frozen)]
        if "q_proj" in path:
            pairs = [tuple(half["1"] for half in pairs[0])]
        for ours, expected in pairs:
            for name in ("a0", "b0"):
                square = [leaf @ leaf.mT if name == "a0" else leaf.mT @ leaf for leaf in (ours[name], expected[name])]
                chex.assert_trees_all_close(*square, rtol=0, atol=1e-3 * float(jnp.abs(square[1]).max()))
    base, trained = load_adapter(out / "adapter", model.params)
    frozen = nodes(trained)["layers/mlp/up_proj/kernel"].frozen
    chex.assert_trees_all_equal(frozen, begun["layers/mlp/up_proj/kernel"].frozen)
    distance = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), base["layers"], model.params["layers"])
    assert distance["mlp"]["up_proj"]["kernel"] > 1e-2 and distance["mlp"]["gate_proj"]["kernel"] == 0


def cut(run, copy, step):
    """The run as if it had been killed after `step`."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name.isdecimal() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


@pytest.mark.nightly
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_resumption_ends_with_the_same_bits(run, places, tmp_path, quant):
    reference, experiment = run[0], an_experiment(places, quant=quant)
    if quant:
        reference = tmp_path / "whole"
        train(experiment, reference, echo=quiet)
    cut(reference, tmp_path / "cut", 3)
    lines = []
    train(experiment, tmp_path / "cut", resume=True, echo=lines.append)
    assert "resuming after step 3" in lines and not any("gradient" in line for line in lines)
    assert (tmp_path / "cut" / "adapter" / LEAVES).read_bytes() == (reference / "adapter" / LEAVES).read_bytes()
    # Killed before the first checkpoint: everything is done again.
    cut(reference, tmp_path / "early", 0)
    shutil.rmtree(tmp_path / "early" / START)
    train(experiment, tmp_path / "early", resume=True, echo=quiet)
    assert (tmp_path / "early" / "adapter" / LEAVES).read_bytes() == (reference / "adapter" / LEAVES).read_bytes()


@pytest.mark.nightly
def test_the_start_is_kept_as_it_was_before_a_procedure(places, tmp_path):
    """A procedure starts from it again in a resumed run, and would otherwise start from what it had made of it."""
    procedure = sx.LoRAPrune(warmup=0.0, cooldown=0.0, every=1, protect=0.0)
    rules = (sx.Rule("self_attn|mlp", sx.LoRAGA(rank=2)),)
    experiment = an_experiment(places, rules=rules, procedure=procedure, steps=2)
    train(experiment, tmp_path / "whole", echo=quiet)
    start = nodes(read_adapter(tmp_path / "whole" / START).adapters)
    assert {type(node.method) for node in start.values()} == {sx.LoRAGA}
    cut(tmp_path / "whole", tmp_path / "cut", 1)
    train(experiment, tmp_path / "cut", resume=True, echo=quiet)
    ends = [(tmp_path / place / "adapter" / LEAVES).read_bytes() for place in ("whole", "cut")]
    assert ends[0] == ends[1]


def test_the_number_of_batches_is_the_users(run, places, tmp_path):
    with pytest.raises(sx.SboraxError, match="hint_batches"):
        an_experiment(places, hint_batches=0)
    with pytest.raises(sx.SboraxError, match="hint_batches differs"):
        train(an_experiment(places, hint_batches=1), run[0], resume=True, echo=quiet)


@pytest.mark.nightly
def test_an_adapted_head_has_a_gradient_of_its_own(places, tmp_path):
    untied = write_model(tmp_path / "untied", hidden_size=64, head_dim=16, tie_word_embeddings=False)
    rules = (sx.Rule("lm_head", sx.LoRAGA(rank=2)),)
    out = tmp_path / "run"
    summary = train(an_experiment((str(untied), places[1]), rules=rules), out, echo=quiet)
    assert summary.last_loss < summary.first_loss
    (node,) = nodes(read_adapter(out / START).adapters).values()
    # Where the gradient were zero, b would be.
    assert float(jnp.abs(node.train["b"]).max()) > 0


def test_plan_prints_its_table(places, capsys, tmp_path):
    save_experiment(an_experiment(places), epath.Path(tmp_path))
    assert main(["plan", str(tmp_path / "config.json")]) == 0
    output = capsys.readouterr().out
    assert "layers/mlp/up_proj" in output and "LoRAGA(rank=4" in output
    assert f" {2 * 4 * (64 + 128):,} " in output


INFORMED = (
    sx.Rule("mlp/gate", sx.CorDA(rank=4)),
    sx.Rule("self_attn/k", sx.chain(sx.CorDA(rank=2, mode="kpm"), sx.DoRA())),
    sx.Rule("self_attn|mlp", sx.EVA(rank=2, rho=4.0, tau=0.9, alpha=4.0)),
)


@pytest.fixture(scope="module")
def informed(places, tmp_path_factory):
    """A run whose adapters start from inputs, and whose ranks they choose."""
    out, lines = tmp_path_factory.mktemp("runs") / "informed", []
    return out, train(an_experiment(places, rules=INFORMED), out, echo=lines.append), lines


def test_a_run_starts_from_the_inputs_of_its_data(informed, places):
    """The same from the public verbs; the ranks that the data chose are those that are trained and counted."""
    out, summary, lines = informed
    assert summary.finished and summary.last_loss < summary.first_loss
    assert "inputs of 5 kernels over 3 batches" in lines and "inputs of layers/mlp/gate_proj over 3 batches" in lines
    model = load_model(places[0])
    batches, _ = read_data(an_experiment(places), model, quiet)
    hints = sx.input_hints(model, INFORMED, first_batches(batches, 3))
    _, adapters = sx.attach(jax.random.key(0), model.params, INFORMED, hints)
    begun = nodes(read_adapter(out / START).adapters)
    assert {path: node.method for path, node in nodes(adapters).items()} == {
        path: node.method for path, node in begun.items()
    }
    ranks = [rank for hint in hints.values() for rank in hint.ranks or ()]
    assert sum(ranks) == 2 * 2 * 5 and len(set(ranks)) > 1
    assert summary.trainable_parameters == sx.count(adapters)


@pytest.mark.nightly
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_resumption_keeps_the_ranks(informed, places, tmp_path, quant):
    reference, experiment = informed[0], an_experiment(places, rules=INFORMED, quant=quant)
    if quant:
        reference = tmp_path / "whole"
        train(experiment, reference, echo=quiet)
    cut(reference, tmp_path / "cut", 3)
    lines = []
    train(experiment, tmp_path / "cut", resume=True, echo=lines.append)
    assert "resuming after step 3" in lines and not any(line.startswith("inputs of") for line in lines)
    assert (tmp_path / "cut" / "adapter" / LEAVES).read_bytes() == (reference / "adapter" / LEAVES).read_bytes()
    cut(reference, tmp_path / "early", 0)
    shutil.rmtree(tmp_path / "early" / START)
    train(experiment, tmp_path / "early", resume=True, echo=quiet)
    assert (tmp_path / "early" / "adapter" / LEAVES).read_bytes() == (reference / "adapter" / LEAVES).read_bytes()
