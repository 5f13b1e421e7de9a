"""Files that hold several projections in one module (Phi-3): read and written part by part."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sborax_models import TINY, make

import sborax as sx
from sborax.adapters.core import dense
from sborax.models import LanguageModel, Llama, LlamaConfig, abstract, load_model, save_hf
from sborax.models.nf4 import NF4Array, quantise

QKV = "model.layers.1.self_attn.qkv_proj.weight"
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("phi3")
    make("phi3", directory, hidden_size=64, intermediate_size=128, num_hidden_layers=2, **TOKENS)
    return directory


def test_parts_are_the_rows_of_the_module_also_in_four_bits(place):
    stored = load_file(place / "model.safetensors")[QKV]
    model, packed = load_model(place), load_model(place, quant="nf4")
    attention = model.params["layers"]["self_attn"]
    parts = [attention[f"{name}_proj"]["kernel"][1] for name in "qkv"]
    assert [part.shape for part in parts] == [(64, 64), (64, 32), (64, 32)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), stored.T)
    up = packed.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(up, NF4Array)
    expected = quantise(model.params["layers"]["mlp"]["up_proj"]["kernel"])
    chex.assert_trees_all_equal(np.asarray(dense(up)), np.asarray(dense(expected)))


def test_layers_of_unequal_size_go_both_ways(tmp_path):
    config = LlamaConfig(
        **{**TINY, "num_hidden_layers": 2}, head_dim=8, model_type="sborax_phi3", layer_sizes=((4, 1, 40), (2, 2, 8))
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract(config))
    save_hf(tmp_path, LanguageModel(Llama(config), params, config, None), params)
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert shapes[QKV] == (16 + 16 + 16, 32) and shapes["model.layers.0.mlp.gate_up_proj.weight"] == (80, 32)
    copy = load_model(tmp_path)
    assert dataclasses.replace(copy.config, bos_token_id=None) == config
    chex.assert_trees_all_equal(copy.params, params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {}, f"tensor '{QKV}' is missing"),
        (lambda tensors: {QKV: tensors[QKV][:-1]}, r"qkv_proj.weight has shape \(127, 64\), config says 128 outputs"),
        (
            lambda tensors: {QKV: tensors[QKV][:, 1:]},
            r"k_proj.weight gives .* shape \(63, 32\), config says \(64, 32\)",
        ),
        (
            lambda tensors: {QKV: tensors[QKV], "model.layers.1.self_attn.q_proj.weight": tensors[QKV]},
            "q_proj.weight' is stored twice",
        ),
    ],
    ids=["missing", "outputs", "inputs", "twice"],
)
def test_modules_that_do_not_fit(change, message, place, tmp_path):
    tensors = load_file(place / "model.safetensors")
    subset = {name: tensor for name, tensor in tensors.items() if name != QKV}
    save_file(subset | change(tensors), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((place / "config.json").read_text())
    with pytest.raises(sx.SboraxError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
