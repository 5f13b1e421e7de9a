"""PEFT's adapters of modules that hold several projections (Phi-3) are adapters of each projection here."""

import json

import jax
import numpy as np
import peft
import pytest
from nightly import nightly_unless
from safetensors.numpy import load_file
from sborax_models import make
from torch_pair import Pair, logits, reloaded, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft, save_peft
from sborax.models.load import load_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:PiSSA changes the base weights:UserWarning",
)
CLOSE = {"rtol": 0, "atol": 1e-4}
RANKS = {"r": 3, "lora_alpha": 6, "rank_pattern": {"qkv_proj": 5}, "alpha_pattern": {"layers.1.mlp.gate_up_proj": 4}}
LORAS = {
    "lora": {**RANKS, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]},
    "rslora": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["gate_up_proj"],
        "use_rslora": True,
        "layers_to_transform": [1],
    },
    "dora": {**RANKS, "target_modules": "all-linear", "use_dora": True},
    "alora": {
        **RANKS,
        "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"],
        "alora_invocation_tokens": [32, 17],
        "task_type": "CAUSAL_LM",
    },
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    place = tmp_path_factory.mktemp("phi3")
    fields = {"num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Pair(make("phi3", place, **fields), load_model(place), place)


@pytest.mark.parametrize("kind", nightly_unless(["lora"], LORAS))
def test_a_file_of_fused_modules_goes_both_ways(kind, pair, tmp_path):
    """The tensors that are written are those that were read."""
    theirs = with_peft(pair, peft.LoraConfig(**LORAS[kind]))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(pair.torch)).max() > 0.1
    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)
    assert "layers/mlp/up_proj/kernel" in nodes(adapters)
    report = save_peft(tmp_path / "ours", pair.ours, params, adapters)
    source, output = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert source.keys() == output.keys() and report.modules == len({key.partition(".lora")[0] for key in source})
    for name, tensor in source.items():
        np.testing.assert_array_equal(output[name], tensor, err_msg=name)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, **CLOSE)


RULES = {
    "some parts": [("q_proj", sx.LoRA(rank=2, alpha=6.0)), ("(v|up|down)_proj", sx.LoRA(rank=3, alpha=4.0))],
    "a sum": [("self_attn", sx.add(sx.LoRA(rank=2), sx.SBoRA(rank=2)))],
    "dora": [("q_proj|k_proj|v_proj|o_proj", sx.DoRA(rank=2, alpha=4.0))],
    "activated parts": [("(q|v|up)_proj", sx.Activated(sx.LoRA(rank=2, alpha=6.0), tokens=(32, 17)))],
    "another kind beside": [("o_proj|down_proj", sx.IA3())],
}


@pytest.mark.parametrize("kind", nightly_unless(["some parts"], RULES))
def test_parts_with_factors_of_their_own_are_put_side_by_side(kind, pair, tmp_path):
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, RULES[kind])
    adapters = shaken(adapters)
    save_peft(tmp_path, pair.ours, params, adapters)
    expected = logits(pair.ours, params, adapters)
    assert np.abs(expected - torch_logits(pair.torch)).max() > 0.1
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path)), expected, **CLOSE)
    np.testing.assert_allclose(logits(pair.ours, *load_peft(tmp_path, pair.ours)), expected, **CLOSE)
    if kind == "some parts":
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["target_modules"] == ["down_proj", "gate_up_proj", "qkv_proj"]
        assert (config["r"], config["rank_pattern"]) == (3, {"self_attn.qkv_proj": 5})


UNREAD = {
    "another kind": (
        peft.IA3Config(target_modules=["qkv_proj"], feedforward_modules=[]),
        "qkv_proj holds q_proj, k_proj, v_proj, and only LoRA and DoRA of such a module .* not IA3; merge it in PEFT",
    ),
    "a start in the base": (
        peft.LoraConfig(target_modules=["gate_up_proj"], init_lora_weights="pissa"),
        "gate_up_proj holds gate_proj, up_proj, and only LoRA and DoRA .* not PiSSA",
    ),
    "blocks of all outputs": (
        peft.LoraConfig(r=4, target_modules=["qkv_proj"], use_bdlora=peft.BdLoraConfig([], ["qkv_proj"], nblocks=2)),
        "qkv_proj holds q_proj, k_proj, v_proj, and only LoRA and DoRA .* not BDLoRA",
    ),
    "further tensors": (
        peft.LoraConfig(target_modules=["qkv_proj"], velora_config=peft.VeloraConfig()),
        "qkv_proj holds q_proj, k_proj, v_proj, and only LoRA and DoRA .* not VeLoRA",
    ),
    "trained whole": (
        peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["qkv_proj"]),
        "modules_to_save: qkv_proj holds several projections",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read(name, pair, tmp_path):
    config, message = UNREAD[name]
    with_peft(pair, config).save_pretrained(tmp_path)
    with pytest.raises(sx.SboraxError, match=message) as caught:
        load_peft(tmp_path, pair.ours)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("k_proj", sx.IA3())], "qkv_proj holds q_proj, k_proj, v_proj, .* not IA3; use as_='lora'"),
        ([("k_proj", sx.DoRA(rank=2))], "q_proj has no DoRA, .* adapts .*qkv_proj as a whole; adapt all of its parts"),
    ],
)
def test_what_is_not_written(rules, message, pair, tmp_path):
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
    with pytest.raises(sx.SboraxError, match=message):
        save_peft(tmp_path, pair.ours, params, shaken(adapters))
