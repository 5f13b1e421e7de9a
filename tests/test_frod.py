"""FRoD: its basis against PEFT's, directions that weights lack, bases in 4 bits, and what PEFT does with a file."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import peft.tuners.frod.model
import pytest
import torch
from bare_kernels import normal
from safetensors.numpy import load_file, save_file
from torch_pair import build, logits, reloaded, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft, save_peft
from sborax.models.nf4 import quantise

pytestmark = [
    pytest.mark.usefixtures("strict"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
UP = normal(0, 4, 12, 8)
BANK = "bank/frod/layers/up"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("frod"))


def attached(*rules, up=UP):
    params = {"layers": {"up": {"kernel": jnp.asarray(up)}}}
    return params, sx.attach(jax.random.key(0), params, rules)[1]


def test_the_basis_is_that_of_peft_but_for_signs():
    """Of well separated directions: eigenvectors of near ones depend on rounding."""
    scales = np.linspace(1.0, 3.0, 12, dtype=np.float32) ** np.arange(4, dtype=np.float32)[:, None]
    up = UP * scales[:, :, None]
    _, adapters = attached(("up", sx.FRoD()), up=up)
    bank = nodes(adapters)[BANK].frozen
    theirs = peft.tuners.frod.model._projection_from_weights([torch.tensor(w.T.copy()) for w in up], 1e-3).numpy()
    rotation = np.abs(np.linalg.solve(theirs, np.asarray(bank["v"])))
    np.testing.assert_allclose(rotation, np.eye(12), atol=2e-3)
    np.testing.assert_allclose(bank["v"] @ bank["v_inv"], np.eye(12), atol=1e-5)
    # Lengths of all layers belong to orthonormal columns.
    np.testing.assert_allclose(np.square(nodes(adapters)["layers/up/kernel"].frozen["l0"]).sum(0), 1.0, rtol=1e-4)


@pytest.mark.nightly
def test_layers_that_are_left_out_are_not_in_the_basis():
    _, adapters = attached(sx.Rule("up", sx.FRoD(), layers=(1, 3)))
    _, pair = attached(("up", sx.FRoD()), up=UP[[1, 3]])
    np.testing.assert_allclose(nodes(adapters)[BANK].frozen["v"], nodes(pair)[BANK].frozen["v"], atol=1e-5)


def test_directions_that_weights_lack_change_nothing():
    """All layers together have 8 outputs, of 12 inputs: V is orthogonal, and four of its columns see no weight."""
    params, adapters = attached(("up", sx.FRoD(density=1.0)), up=UP[:1])
    by_path = nodes(adapters)
    node, v = by_path["layers/up/kernel"], by_path[BANK].frozen["v"]
    np.testing.assert_allclose(v.T @ v, np.eye(12), atol=1e-5)
    assert np.count_nonzero(node.frozen["l0"]) == 8
    tuned = shaken(adapters)
    train = nodes(tuned)["layers/up/kernel"].train
    lacking = np.flatnonzero(np.asarray(node.frozen["l0"])[0] == 0.0)
    merged = sx.merge(params, tuned)["layers"]["up"]["kernel"]
    train["l"] = train["l"].at[0, lacking].add(1.0)
    chex.assert_trees_all_equal(sx.merge(params, tuned)["layers"]["up"]["kernel"], merged)


def test_weights_that_leave_out_an_input_are_refused():
    up = np.array(UP)
    up[:, 5] = 0.0
    with pytest.raises(sx.SboraxError, match=f"{BANK}: v; the weights of the kind leave out a direction of their in"):
        attached(("up", sx.FRoD()), up=up)


@pytest.mark.nightly
def test_a_basis_of_rounded_weights_is_theirs():
    """Kernels of a base in 4 bits are adapted as they are. A base that is rounded later keeps V, and gets its L0."""
    up = np.float32(0.1) * normal(1, 3, 64, 64)
    packed = quantise(jnp.asarray(up))
    rules = [("up", sx.FRoD())]
    params, adapters = attached(*rules, up=np.asarray(packed.dense(), np.float32))
    of_codes = {"layers": {"up": {"kernel": packed}}}
    chex.assert_trees_all_close(sx.attach(jax.random.key(0), of_codes, rules)[1], adapters, atol=1e-5)
    dense = nodes(attached(*rules, up=up)[1])
    rounded = nodes(sx.rebase(params, attached(*rules, up=up)[1]))
    chex.assert_trees_all_equal(rounded[BANK], dense[BANK])
    v_inv = np.asarray(dense[BANK].frozen["v_inv"])
    expected = np.linalg.norm(v_inv @ np.asarray(packed.dense(), np.float32), axis=-1)
    np.testing.assert_allclose(rounded["layers/up/kernel"].frozen["l0"], expected, rtol=1e-4)
    with pytest.raises(sx.SboraxError, match="FRoD reads a bank, which these adapters lack"):
        sx.rebase(params, {"layers": adapters["layers"]})


def test_peft_makes_its_basis_again(pair, tmp_path, monkeypatch):
    """So in PEFT a file has its function where the basis is the same again, and here everywhere."""
    theirs = with_peft(pair, peft.FrodConfig(target_modules=["q_proj"], progressbar=False))
    theirs.save_pretrained(tmp_path)
    expected = torch_logits(theirs)
    np.testing.assert_allclose(logits(pair.ours, *load_peft(tmp_path, pair.ours)), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path)), expected, rtol=0, atol=1e-4)
    basis_of = peft.tuners.frod.model._projection_from_weights
    monkeypatch.setattr(peft.tuners.frod.model, "_projection_from_weights", lambda *args: -basis_of(*args))
    assert np.abs(torch_logits(reloaded(pair, tmp_path)) - expected).max() > 0.1


def test_a_basis_from_here_is_not_written_and_one_of_peft_not_made(pair, tmp_path):
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", sx.FRoD())])
    with pytest.raises(sx.SboraxError, match="FROD's files hold a basis that PEFT makes again"):
        save_peft(tmp_path, pair.ours, params, adapters)
    assert save_peft(tmp_path, pair.ours, params, shaken(adapters), as_="lora", rank=32).peft_type == "LORA"
    with pytest.raises(sx.SboraxError, match="bank/frod/.*q_proj: basis='peft' is read from PEFT's files; leave it"):
        sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", sx.FRoD(basis="peft"))])


@pytest.mark.nightly
def test_a_file_with_a_basis_or_places_that_are_none_is_refused(pair, tmp_path):
    with_peft(pair, peft.FrodConfig(target_modules=["q_proj"], progressbar=False)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    v, idx = "base_model.frod_V.self_attn_q_proj", "base_model.frod_s_indices.self_attn_q_proj"
    for name, value, message in (
        (v, np.zeros_like(tensors[v]), "frod_V is singular"),
        (idx, tensors[idx] + 31, "an index lies outside"),
    ):
        save_file({**tensors, name: value}, file)
        with pytest.raises(sx.SboraxError, match=message):
            load_peft(tmp_path, pair.ours)
    save_file(tensors, file)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sparse_rate": 0.5}))
    with pytest.raises(sx.SboraxError, match="s_indices.* has shape .*config and model say"):
        load_peft(tmp_path, pair.ours)


@pytest.mark.parametrize("options", [{"density": 0.0}, {"ridge": 0.0}])
def test_options_that_are_none_are_refused(options):
    with pytest.raises(sx.SboraxError, match=next(iter(options))):
        attached(("up", dataclasses.replace(sx.FRoD(), **options)))
