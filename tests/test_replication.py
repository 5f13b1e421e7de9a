"""Copies of layers: the deeper model is PEFT's, and files for it are read on it and refused elsewhere."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from nightly import nightly_unless
from sborax_models import make, relative, tokens_of
from sborax_models import torch_logits as logits_of
from torch_pair import build, logits, reloaded, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.core import is_weight
from sborax.adapters.leaves import flatten
from sborax.models.load import load_model

RANGES = [(0, 4), (2, 5)]
LAYERS = [0, 1, 2, 3, 2, 3, 4]
RULES = [("q_proj|down_proj", sx.LoRA(rank=3, alpha=6.0))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base"), num_hidden_layers=5)


@pytest.fixture(scope="module")
def deeper(pair):
    return sx.replicate_layers(pair.ours, RANGES)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_model_and_its_adapters_are_those_of_peft(pair, deeper, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], layer_replication=RANGES)
    theirs = with_peft(pair, config)
    expected = torch_logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert deeper.config.num_hidden_layers == 7
    with theirs.disable_adapter():
        np.testing.assert_allclose(logits(deeper, deeper.params, None), torch_logits(theirs), rtol=0, atol=1e-4)
    params, adapters = sx.load_peft(tmp_path / "theirs", deeper)
    np.testing.assert_allclose(logits(deeper, params, adapters), expected, rtol=0, atol=1e-4)
    assert sx.count(adapters) == 7 * 3 * (32 + 32 + 48 + 32)
    # Back to PEFT: of the base with the field, and of the deeper model without.
    tuned = shaken(adapters)
    expected = logits(deeper, params, tuned)
    sx.save_peft(tmp_path / "ours", deeper, params, tuned, layer_replication=RANGES)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["layer_replication"] == [[0, 4], [2, 5]]
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, rtol=0, atol=1e-4)
    sx.save_peft(tmp_path / "plain", deeper, params, tuned)
    assert "layer_replication" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    sx.save_hf(tmp_path / "deeper", deeper, deeper.params)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "deeper")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "plain").eval()
    np.testing.assert_allclose(torch_logits(model), expected, rtol=0, atol=1e-4)


def test_a_file_for_copies_is_refused_without_them(pair, deeper, tmp_path):
    _, adapters = sx.attach(jax.random.key(0), deeper.params, RULES)
    adapters = shaken(adapters)
    sx.save_peft(tmp_path, deeper, deeper.params, adapters, layer_replication=RANGES)
    ranges = [list(pair) for pair in RANGES]
    assert f"model = sx.replicate_layers(model, {ranges})" in (tmp_path / "README.md").read_text()

    def refused(says, run):
        with pytest.raises(sx.SboraxError) as caught:
            run()
        assert says in str(caught.value) and "\n" not in str(caught.value)

    call = "give sx.replicate_layers(model, [(0, 4), (2, 5)])"
    refused(f"of a model of 7 layers, and this one has 5; {call}", lambda: sx.load_peft(tmp_path, pair.ours))
    variant = sx.replicate_layers(pair.ours, [(0, 5), (3, 5)])
    refused(f"layers 2 and 4 are not copies of one in this model; {call}", lambda: sx.load_peft(tmp_path, variant))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for value, says in [
        ([[0, 4], [5, 2]], "expected pairs [start, end] of layers, 0 <= start < end, got [5, 2]"),
        ([[0, 4], 3], "expected pairs [start, end] of layers, 0 <= start < end, got 3"),
        ("many", "expected a list of pairs of layers, such as [[0, 4], [2, 5]], got 'many'"),
        ([[0, 4096]] * 2, "more than 4,096 layers"),
    ]:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "layer_replication": value}))
        refused(f"layer_replication: {says}", lambda: sx.load_peft(tmp_path, deeper))

    def save(adapters, params=deeper.params, model=deeper):
        return lambda: sx.save_peft(tmp_path / "never", model, params, adapters, layer_replication=RANGES)

    shallow = shaken(sx.attach(jax.random.key(0), pair.ours.params, RULES)[1])
    refused("of a model of 7 layers, and this one has 5", save(shallow, pair.ours.params, pair.ours))
    hira = sx.attach(jax.random.key(0), deeper.params, [("q_proj", sx.HiRA(rank=2))])[1]
    refused("PEFT's HIRA has no layer_replication; leave it out", save(shaken(hira)))
    refused("there are none; leave it out", save({}, {**deeper.params, "norm": {"scale": 2 * np.ones(32, np.float32)}}))
    assert not (tmp_path / "never").exists()
    for ranges, says in [
        ([(0, 4), (3, 6)], "the model has layers 0 to 4"),
        ([], "expected a list of pairs of layers"),
        ([(2, 2)], "expected pairs [start, end] of layers"),
    ]:
        refused(says, lambda ranges=ranges: sx.replicate_layers(pair.ours, ranges))


def test_biases_that_copies_share_in_peft_are_not_written(tmp_path):
    biased = build(tmp_path / "base", attention_bias=True)
    double = sx.replicate_layers(biased.ours, [(0, 2), (0, 2)])
    attention = double.params["layers"]["self_attn"]
    block = {**attention, "q_proj": {**attention["q_proj"], "bias": attention["q_proj"]["bias"] + 1}}
    params = {**double.params, "layers": {**double.params["layers"], "self_attn": block}}
    adapters = shaken(sx.attach(jax.random.key(0), params, [("q_proj", sx.LoRA(rank=2))])[1])
    with pytest.raises(sx.SboraxError, match="biases were trained, which copies of a layer share in PEFT"):
        sx.save_peft(tmp_path / "never", double, params, adapters, layer_replication=[(0, 2), (0, 2)])


def test_copies_share_their_weights_where_layers_are_apart(pair):
    apart = load_model(pair.path, scan=False)
    deeper = sx.replicate_layers(apart, RANGES)
    leaves, source = flatten(deeper.params), flatten(apart.params)
    assert len(leaves) == len(flatten(deeper.abstract()))
    for path, leaf in leaves.items():
        top, number, *tail = path.split("/")
        assert leaf is source["/".join([top, str(LAYERS[int(number)]), *tail]) if top == "layers" else path]
    stacked = sx.replicate_layers(pair.ours, RANGES)
    np.testing.assert_allclose(
        logits(deeper, deeper.params, None), logits(stacked, stacked.params, None), rtol=0, atol=1e-5
    )


def reordered(model, order):
    """torch's model with copies of its layers."""
    model = copy.deepcopy(model)
    layers = [copy.deepcopy(model.model.layers[layer]) for layer in order]
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(order)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[layer] for layer in order]
    return model


FAMILIES = {
    # Windows shorter than the text in its first layer, and a rotary embedding of their own.
    "gemma3_text": {"sliding_window": 4, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("kind", nightly_unless(["gemma3_text"], FAMILIES))
def test_windows_and_experts_go_with_their_layers(kind, tmp_path):
    order = [0, 1, 1, 0, 1]
    theirs = make(kind, tmp_path, num_hidden_layers=2, **FAMILIES[kind])
    deeper = sx.replicate_layers(load_model(tmp_path), [(0, 2), (1, 2), (0, 2)])
    assert jax.tree.map(jnp.shape, deeper.params) == jax.tree.map(jnp.shape, deeper.abstract())
    tokens = tokens_of(deeper, 2, 9)
    want = logits_of(reordered(theirs, order), tokens)
    assert relative(jax.jit(deeper.apply)(deeper.params, None, tokens), want) < 1e-5


@pytest.mark.nightly
def test_codes_of_four_bits_are_copied_as_they_are(tmp_path):
    make("llama", tmp_path, hidden_size=64, intermediate_size=128)
    model = load_model(tmp_path, quant="nf4")
    deeper = sx.replicate_layers(model, [(1, 3), (0, 3)])
    leaves = flatten(model.params)
    assert any(map(is_weight, leaves.values()))
    for path, leaf in flatten(deeper.params).items():
        for got, source in zip(jax.tree.leaves(leaf), jax.tree.leaves(leaves[path]), strict=True):
            np.testing.assert_array_equal(
                got, source[np.asarray([1, 2, 0, 1, 2])] if path.startswith("layers/") else source
            )
    params, adapters = sx.attach(jax.random.key(0), deeper.params, RULES)
    assert np.isfinite(logits(deeper, params, shaken(adapters))).all()
