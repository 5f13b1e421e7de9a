"""Vectors of chosen tokens, trained beside adapters in place of the whole embedding."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from nightly import nightly_unless
from safetensors.numpy import load_file
from test_train import a_batch
from tiny_model import WIDE, write_data, write_model

import sborax as sx
from sborax.cli.main import main
from sborax.cli.targets import load_target
from sborax.interop.peft import load_peft, save_peft
from sborax.layout.sharding import Layout
from sborax.layout.state import put_together, start, take_apart
from sborax.models import LanguageModel, Llama, load_model
from sborax.records.adapter import load_adapter, save_adapter
from sborax.sweep.grid import Sweep
from sborax.sweep.run import sweep
from sborax.train.loop import train
from sborax.train.step import make_step

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
)
TABLE, HEAD = "embed_tokens/embedding", "lm_head/kernel"
VECTORS, TOKENS = "embed_tokens/vectors", "embed_tokens/tokens"
CHOSEN = (0, 40, 1)


def assert_equal_in_peft(apply, params, adapters, base, directory) -> None:
    """Logits are those of PEFT with the adapter in `directory` over the model `base`."""
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), directory).eval()
    tokens = np.asarray([[*CHOSEN, 7, 99]], np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(apply(params, adapters, jnp.asarray(tokens)), expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module", params=nightly_unless(["tied"], ["tied", "untied"]))
def place(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param) / "model", tie_word_embeddings=request.param == "tied")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.jsonl")


def an_experiment(place, data, **changes):
    options = sx.Data(str(data), template="{instruction}", answer=" {output}", max_length=32, buckets=(32,))
    settings = {"rules": [("q_proj", sx.LoRA(rank=4))], "steps": 4, "batch_size": 2, "save": sx.Save(every=2)}
    optimizer = sx.Optimizer(lr=1e-2, decay=0.1, schedule="constant", warmup=0)
    return sx.Experiment(str(place), options, **{"optimizer": optimizer, "train_tokens": CHOSEN, **settings, **changes})


def test_a_step_is_that_of_the_whole_embedding_in_these_rows(place):
    model = load_model(place)
    params, adapters = sx.attach(jax.random.key(0), model.params, [("q_proj", sx.LoRA(rank=4))])
    tx, batch = optax.sgd(1.0), a_batch(1, 4)
    # Without these tokens in the batch, vectors of an embedding that is not tied have no gradient.
    batch["tokens"][0, :, :3] = CHOSEN

    def advance(**options):
        parts = take_apart(params, adapters, **options)
        state, _ = make_step(model, tx, jax.random.key(1))(start(parts, tx), parts.frozen, parts.base, batch)
        return parts, state

    parts, state = advance(train_tokens=CHOSEN)
    assert parts.count == sx.count(adapters) + 3 * 32
    table = put_together(parts.base, state.train["base"])["embed_tokens"]["embedding"]
    expected = advance(train_also=("embed_tokens",))[1].train["base"][TABLE]
    initial, rows = model.params["embed_tokens"]["embedding"], np.asarray(CHOSEN)
    assert np.abs(table - initial)[rows].max(axis=1).min() > 1e-4
    np.testing.assert_allclose(table[rows], expected[rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.delete(table, rows, 0), np.delete(initial, rows, 0))


def test_a_run_its_files_and_its_export(place, data, tmp_path, capsys):
    """The adapter's file has these vectors, PEFT's has them as rows, and neither has the table."""
    experiment = an_experiment(place, data)
    train(experiment, tmp_path / "run")
    model = load_model(place)
    params, adapters = load_adapter(tmp_path / "run" / "adapter", model.params)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert stored[f"base/{VECTORS}"].shape == (3, 32) and stored[f"base/{TOKENS}"].tolist() == list(CHOSEN)
    assert f"base/{TABLE}" not in stored
    mask = (params["embed_tokens"]["embedding"] != model.params["embed_tokens"]["embedding"]).any(axis=1)
    assert np.flatnonzero(mask).tolist() == sorted(CHOSEN)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trainable_parameters"] == sx.count(adapters) + 3 * 32
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "run"), "train_tokens=[0, 40]", "--mesh", "fsdp=2"]) == 0
    assert "trained in the base itself: 64 parameters in 1 arrays" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == sorted(CHOSEN) and "modules_to_save" not in config
    assert_equal_in_peft(model.apply, params, adapters, place, tmp_path / "peft")


BOTH = {"embed_tokens": CHOSEN, "lm_head": (40, 7)}


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("untied") / "model", tie_word_embeddings=False)


@pytest.mark.parametrize("selection", nightly_unless([BOTH], [BOTH, {"lm_head": (40, 7)}]), ids=len)
def test_vectors_of_a_head(selection, untied, data, tmp_path, capsys):
    """As the whole head in these columns, in a run, its files, and PEFT's."""
    model = load_model(untied)
    tx, batch = optax.sgd(1.0), a_batch(1, 4)

    def advance(**options):
        parts = take_apart(*sx.attach(jax.random.key(0), model.params, [("q_proj", sx.LoRA(rank=4))]), **options)
        return parts, make_step(model, tx, jax.random.key(1))(start(parts, tx), parts.frozen, parts.base, batch)[0]

    parts, state = advance(train_tokens=selection)
    head = put_together(parts.base, state.train["base"])["lm_head"]["kernel"]
    expected, initial = advance(train_also=("lm_head",))[1].train["base"][HEAD], model.params["lm_head"]["kernel"]
    columns = list(selection["lm_head"])
    np.testing.assert_allclose(head[:, columns], expected[:, columns], rtol=1e-5, atol=1e-6)
    assert np.flatnonzero((head != initial).any(axis=0)).tolist() == sorted(columns)
    train(an_experiment(untied, data, train_tokens=selection), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train_tokens"]["lm_head"] == columns
    params, adapters = load_adapter(tmp_path / "run" / "adapter", model.params)
    assert np.flatnonzero((params["lm_head"]["kernel"] != initial).any(axis=0)).tolist() == sorted(columns)
    stored = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert stored["base/lm_head/vectors"].shape == (2, 32) and f"base/{HEAD}" not in stored
    assert main(["train", str(tmp_path / "run"), "--out", str(tmp_path / "run"), "--resume", "steps=5"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "peft")]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {module: sorted(ids) for module, ids in selection.items()}
    params, adapters = load_adapter(tmp_path / "run" / "adapter", model.params)
    assert_equal_in_peft(model.apply, params, adapters, untied, tmp_path / "peft")


@pytest.mark.nightly
@pytest.mark.parametrize("procedure", [None, sx.COLA(every=1)])
def test_a_run_goes_on_as_if_it_had_not_stopped(procedure, place, data, tmp_path):
    experiment = an_experiment(place, data, procedure=procedure)
    train(experiment, tmp_path / "once")
    # As a run that was killed after its first checkpoint leaves it.
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    for directory in ("adapter", "checkpoints/4"):
        shutil.rmtree(tmp_path / "twice" / directory)
    (tmp_path / "twice" / "summary.json").unlink()
    train(experiment, tmp_path / "twice", resume=True)
    expected, output = (
        load_file(tmp_path / name / "adapter" / "adapter.safetensors")[f"base/{VECTORS}"] for name in ("once", "twice")
    )
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-6)


@pytest.mark.nightly
def test_tokens_that_the_first_batch_lacks_are_not_dead(place, data, tmp_path):
    """Their vectors in an embedding that is not tied have no gradient, and stay as they are."""
    tied, tables = load_model(place).config.tie_word_embeddings, []
    for number, absent in enumerate(((), (200,))):
        experiment = an_experiment(place, data, train_tokens=absent, steps=2)
        experiment = dataclasses.replace(experiment, optimizer=dataclasses.replace(experiment.optimizer, decay=0.0))
        train(experiment, tmp_path / str(number))
        params, _ = load_adapter(tmp_path / str(number) / "adapter", load_model(place).params)
        tables.append(params["embed_tokens"]["embedding"])
    assert np.flatnonzero((tables[0] != tables[1]).any(axis=1)).tolist() == ([200] if tied else [])


@pytest.mark.nightly
def test_a_run_on_a_base_in_four_bits(data, tmp_path):
    """The embedding is not quantised, and the run's file of PEFT is read on such a base."""
    place = write_model(
        tmp_path / "model", hidden_size=64, head_dim=16, intermediate_size=128, tie_word_embeddings=False
    )
    train(an_experiment(place, data, quant="nf4"), tmp_path / "run")
    target, tokens = load_target(str(tmp_path / "run")), jnp.asarray([[*CHOSEN, 7, 99]])
    expected = target.model.apply(target.params, target.adapters, tokens)
    save_peft(tmp_path / "peft", target.model, target.params, target.adapters)
    read = load_peft(tmp_path / "peft", target.model)
    np.testing.assert_allclose(target.model.apply(*read, tokens), expected, rtol=0, atol=1e-6)
    base = target.model.params["embed_tokens"]["embedding"]
    assert np.flatnonzero((read[0]["embed_tokens"]["embedding"] != base).any(axis=1)).tolist() == sorted(CHOSEN)


@pytest.mark.nightly
def test_members_of_a_sweep_are_their_single_runs(place, data, tmp_path):
    experiment = an_experiment(place, data)
    sweep(Sweep(experiment, {"optimizer.lr": (1e-2, 3e-2)}), tmp_path / "sweep", echo=lambda _: None)
    faster = dataclasses.replace(experiment.optimizer, lr=3e-2)
    train(dataclasses.replace(experiment, optimizer=faster), tmp_path / "alone")
    (member,) = (path for path in (tmp_path / "sweep").glob("*/adapter") if "3" in path.parent.name)
    params = load_model(place).params
    ours, alone = (
        load_adapter(path, params)[0]["embed_tokens"]["embedding"] for path in (member, tmp_path / "alone" / "adapter")
    )
    np.testing.assert_allclose(ours, alone, rtol=0, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_a_step_on_a_mesh(sizes):
    model = LanguageModel(Llama(WIDE), {}, WIDE, None)
    params = jax.jit(model.module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tx, batch = optax.sgd(1.0), a_batch(1, 8)
    batch |= {name: batch[name] % 128 for name in ("tokens", "targets")}

    def advance(layout):
        parts = take_apart(*sx.attach(jax.random.key(0), params, [("q_proj", sx.LoRA(rank=8))]), train_tokens=CHOSEN)
        with layout.context():
            parts = layout.place(parts, WIDE)
            state, shardings = layout.state(start(parts, tx))
            step = make_step(model, tx, jax.random.key(1), False, shardings)
            state, numbers = step(state, parts.frozen, parts.base, layout.batch(batch))
        return jax.device_get((state.train["base"][VECTORS], numbers["loss"]))

    for ours, alone in zip(advance(Layout.of(sizes, 8)), advance(Layout()), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=0, atol=1e-5)


HEADS = {"train_tokens": {"lm_head": (3,)}, "train_also": ("lm_head",)}


def test_refused(place, data, tmp_path):
    def refusal(message, run):
        with pytest.raises(sx.SboraxError, match=message):
            run()

    refusal("train_tokens: expected distinct ids", lambda: an_experiment(place, data, train_tokens=(3, 3)))
    refusal("train_tokens: expected distinct ids", lambda: an_experiment(place, data, train_tokens=(-1,)))
    refusal("not of 'wte'", lambda: an_experiment(place, data, train_tokens={"wte": (3,)}))
    refusal("all vectors of lm_head are trained", lambda: an_experiment(place, data, **HEADS))
    refusal("all vectors of embed_tokens are trained", lambda: an_experiment(place, data, train_also=("embed_tokens",)))
    params = load_model(place).params
    refusal("tokens 0..257, and not 258", lambda: take_apart(params, {}, train_tokens=(3, 258)))
    if load_model(place).config.tie_word_embeddings:
        refusal("no lm_head: it is tied to", lambda: take_apart(params, {}, train_tokens={"lm_head": (3,)}))
    refusal("no embed_tokens", lambda: take_apart({"layer": {"kernel": jnp.ones((2, 2))}}, {}, train_tokens=(1,)))
    adapted = sx.attach(jax.random.key(0), params, [("embed_tokens", sx.LoRA(rank=2))])
    refusal("embed_tokens/embedding has an adapter, too", lambda: take_apart(*adapted, train_tokens=(1,)))
    for vectors in ({VECTORS: jnp.ones((2, 32))}, {VECTORS: jnp.ones((1, 32)), TOKENS: jnp.asarray([258])}):
        save_adapter(tmp_path, {}, trained_base=vectors)
        refusal("do not fit this model's embedding and head", lambda: load_adapter(tmp_path, params))
