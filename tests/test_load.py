"""Reading and writing checkpoints: what comes back, and what is refused."""

import json
import os
import shutil

import chex
import jax
import numpy as np
import pytest
import torch
import transformers
from sborax_models import make, relative, tokens_of, torch_logits
from tiny_gguf import write_gguf

import sborax as sx
from sborax.models import hf_module, load_config, load_model, save_hf
from sborax.models.gguf import open_gguf
from sborax.models.load import find

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny checkpoint in three shards with attention biases, and its torch model."""
    place = tmp_path_factory.mktemp("original")
    return place, make("llama", place, "30KB", attention_bias=True)


@pytest.fixture
def copy(original, tmp_path):
    """The tiny checkpoint, to be broken."""
    return shutil.copytree(original[0], tmp_path / "copy")


def change(place, **fields):
    file = place / "config.json"
    raw = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({key: value for key, value in raw.items() if value != "drop"}))


@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "unrolled"])
def test_saved_model_loads_in_transformers_with_the_same_bits(original, tmp_path, scan):
    place, reference = original
    model = load_model(place, scan=scan)
    save_hf(tmp_path / "saved", model, model.params, shard_bytes=20_000)
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 2
    second, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    theirs, ours = reference.state_dict(), second.state_dict()
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name
    tokens = tokens_of(model, 2, 9)
    np.testing.assert_array_equal(torch_logits(second, tokens), torch_logits(reference, tokens))
    with pytest.raises(sx.SboraxError, match="already holds a model"):
        save_hf(tmp_path / "saved", model, model.params)


def test_bfloat16_and_the_tokenizer_survive_saving(llama, tmp_path):
    model = load_model(llama, dtype="bfloat16")
    save_hf(tmp_path, model, model.params)
    second = load_model(tmp_path, dtype="bfloat16")
    chex.assert_trees_all_equal(second.params, model.params)
    assert second.config == model.config
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert reference.dtype == torch.bfloat16
    text = "Lily and 3 dogs\nwent home."
    for tokenizer in (second.tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_models_are_found_by_name(original, monkeypatch, tmp_path):
    place, _ = original
    monkeypatch.setenv("SBORAX_MODELS", str(place.parent))
    assert find(place.name) == place
    monkeypatch.setenv("SBORAX_MODELS", os.pathsep.join((str(tmp_path), str(place.parent))))
    assert find(place.name) == place
    assert load_config(place.name) == load_model(place).config


def test_names_of_modules():
    assert hf_module("layers/self_attn/q_proj", 3) == "model.layers.3.self_attn.q_proj"
    assert hf_module("layers/7/mlp/up_proj") == "model.layers.7.mlp.up_proj"
    assert hf_module("lm_head") == "lm_head"
    with pytest.raises(sx.SboraxError, match="qkv_proj"):
        hf_module("layers/3/self_attn/qkv_proj")
    with pytest.raises(sx.SboraxError, match="say which layer"):
        hf_module("layers/self_attn/q_proj")


CONFIG_ERRORS = {
    "model_type": ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    "missing": ({"hidden_size": "drop"}, "field 'hidden_size' is missing"),
    "ill-typed": ({"num_hidden_layers": "three"}, "num_hidden_layers must be a positive whole number"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = gelu is not supported"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
    "rope": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn' is not supported"),
    "rope-field": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "unknown field 'beta'"),
    "rope-factor": ({"rope_parameters": {"rope_type": "linear"}}, "rope scaling: field 'factor' is missing"),
    "old-rope": ({"rope_parameters": "drop", "rope_scaling": {"type": "dynamic"}}, "rope type 'dynamic'"),
    "unknown": ({"residual_multiplier": 0.5}, "unknown field 'residual_multiplier'"),
    "heads": ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
    "shape": ({"intermediate_size": 41}, "gives layers/mlp/down_proj/kernel shape"),
    "lost": ({"mlp_bias": True}, "tensor 'model.layers.0.mlp.down_proj.bias' is missing"),
    "unused": ({"attention_bias": False}, "12 tensors the model does not use"),
    "tied": ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_configs_that_are_refused(copy, name):
    fields, message = CONFIG_ERRORS[name]
    change(copy, **fields)
    with pytest.raises(sx.SboraxError, match=message) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def truncate(place):
    shard = sorted(place.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


FILE_ERRORS = {
    "directory": (shutil.rmtree, "no such directory or .gguf file"),
    "config": (lambda place: (place / "config.json").unlink(), "config.json: missing"),
    "config-json": (lambda place: (place / "config.json").write_text("{"), "config.json: not JSON"),
    "shard": (lambda place: sorted(place.glob("*.safetensors"))[0].unlink(), "model-00001-of-.* missing"),
    "truncated": (truncate, "not a readable safetensors file"),
    "index": (lambda place: (place / "model.safetensors.index.json").write_text("{}"), "not an index"),
    "tokenizer": (lambda place: (place / "tokenizer.json").write_text("{}"), "not a readable tokenizer"),
    "sentencepiece": (lambda place: (place / "tokenizer.model").write_text(""), "only tokenizer.model"),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_files_that_are_refused(copy, name):
    harm, message = FILE_ERRORS[name]
    harm(copy)
    with pytest.raises(sx.SboraxError, match=message) as caught:
        load_model(copy)
    assert "\n" not in str(caught.value)


def test_options_that_are_refused(original, monkeypatch):
    with pytest.raises(sx.SboraxError, match="remat = 'some'"):
        load_model(original[0], remat="some")
    with pytest.raises(sx.SboraxError, match="dtype int8"):
        load_model(original[0], dtype="int8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(sx.SboraxError, match="not found on the hub") as caught:
        load_model("no-such-organisation/no-such-model")
    assert "\n" not in str(caught.value)


def test_gguf_equals_the_directory(original, tmp_path):
    place, reference = original
    write_gguf(tmp_path / "tiny.gguf", reference)
    model, expected = load_model(tmp_path / "tiny.gguf"), load_model(place)
    chex.assert_trees_all_equal(model.params, expected.params)
    assert model.config.rms_norm_eps == 1e-5 and model.config.attention_bias
    tokens = tokens_of(model, 1, 9)
    logits = jax.jit(model.apply)(model.params, None, tokens)
    assert relative(logits, torch_logits(reference, tokens)) < 1e-5
    assert model.tokenizer("cab a")["input_ids"] == [0, 3, 10, 9, 1]
    assert model.tokenizer.decode([3, 10, 9, 1]) == "cab a"


@pytest.mark.parametrize(
    ("pre", "add_bos", "is_added"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", True, True),
        ("llama-bpe", False, False),
        ("gpt-2", None, False),
        ("smollm", None, False),
        ("qwen2", None, False),
    ],
)
def test_a_gguf_that_does_not_say_begins_texts_as_llama_cpp_does(original, tmp_path, pre, add_bos, is_added):
    write_gguf(tmp_path / "tiny.gguf", original[1], pre, add_bos)
    assert open_gguf(tmp_path / "tiny.gguf").tokenizer()("ab")["input_ids"] == [0] * is_added + [10]


@pytest.mark.parametrize(
    ("fields", "kind", "factor"),
    [
        ({"type": "linear", "factor": 4.0}, "linear", 4.0),
        ({"factor": 4.0}, "linear", 4.0),
        ({"type": "none", "factor": 4.0}, "default", 1.0),
        ({"type": "linear"}, "default", 1.0),
        ({"factor": 0.0}, "default", 1.0),
        ({}, "default", 1.0),
    ],
    ids=str,
)
def test_rope_of_a_gguf_is_scaled_as_llama_cpp_does(original, tmp_path, fields, kind, factor):
    """Linearly where no type is named. Without a factor, or with one of 0, nothing is scaled."""
    extra = {f"llama__rope__scaling__{key}": value for key, value in fields.items()}
    write_gguf(tmp_path / "tiny.gguf", original[1], **extra)
    rope = load_config(tmp_path / "tiny.gguf").rope
    assert (rope.kind, rope.factor) == (kind, factor)


def test_gguf_that_is_refused(original, tmp_path):
    write_gguf(tmp_path / "more.gguf", original[1], llama__logit_scale=2.0)
    with pytest.raises(sx.SboraxError, match="'llama.logit_scale' is not supported"):
        load_model(tmp_path / "more.gguf")
    content = (tmp_path / "more.gguf").read_bytes()
    for size in (2, 200, 1500, len(content) - 1000):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(sx.SboraxError, match="not a readable GGUF file") as caught:
            load_model(tmp_path / "cut.gguf")
        assert "\n" not in str(caught.value)
