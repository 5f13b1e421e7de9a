"""LoRA on experts, which PEFT adapts as parameters: its files here, and ours there."""

import json

import jax
import numpy as np
import peft
import pytest
from nightly import nightly_unless
from sborax_models import make, relative
from torch_pair import Pair, reloaded, shaken, torch_logits, with_peft
from torch_pair import logits as our_logits

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft, save_peft
from sborax.models import load_model

TOLERANCE = 1e-5
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODELS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # The inner width is half of the outer one, so that shapes do not tell the two parameters apart.
    "qwen3_moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}


@pytest.fixture(scope="module", params=nightly_unless(["qwen3_moe"], MODELS))
def pair(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    fields = {"num_hidden_layers": 2, "eos_token_id": 1, "vocab_size": 64, **MODELS[request.param]}
    return Pair(make(request.param, place, **fields), load_model(place), place)


WRITTEN = {
    "both": ({"target_parameters": EXPERTS, "target_modules": []}, 6),
    "one beside attention": (
        {"target_parameters": EXPERTS[1:], "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}, 3
    ),
    "the other": ({"target_parameters": ["experts.gate_up_proj"], "target_modules": [], "use_rslora": True}, 4),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", nightly_unless(["one beside attention"], WRITTEN))
def test_files_of_peft_give_its_logits(pair, name, tmp_path):
    fields, count = WRITTEN[name]
    theirs = with_peft(pair, peft.LoraConfig(r=3, lora_alpha=8, lora_dropout=0.0, **fields))
    theirs.save_pretrained(tmp_path)
    params, adapters = load_peft(tmp_path, pair.ours)
    assert len(nodes(adapters)) == {6: 3, 3: 2, 4: 2}[count]
    expected = torch_logits(theirs)
    assert relative(our_logits(pair.ours, params, adapters), expected) < TOLERANCE
    assert relative(expected, torch_logits(pair.torch)) > 1e-2


BY_LAYER = {
    "alpha": {"alpha_pattern": {"model.layers.1.mlp.experts.down_proj": 20}},
    "rank": {"rank_pattern": {"model.layers.1.mlp.experts.down_proj": 2}},
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
# PEFT looks for the keys of patterns among modules only, though it follows those of parameters.
@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("scan", [True, False], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("name", BY_LAYER)
def test_patterns_that_tell_layers_apart(pair, name, scan, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=8, target_parameters=EXPERTS, target_modules=[], **BY_LAYER[name])
    theirs = with_peft(pair, config)
    theirs.save_pretrained(tmp_path)
    ours = pair.ours if scan else load_model(pair.path, scan=False)
    if scan and name == "rank":
        with pytest.raises(sx.SboraxError, match="experts of different layers have different ranks"):
            load_peft(tmp_path, ours)
        return
    assert relative(our_logits(ours, *load_peft(tmp_path, ours)), torch_logits(theirs)) < TOLERANCE


OURS = {
    "three methods": [
        ("experts/gate", sx.LoRA(rank=2, alpha=4.0)),
        ("experts/up", sx.SBoRA(rank=3)),
        ("experts/down", sx.PiSSA(rank=2)),
        ("q_proj", sx.LoRA(rank=4)),
    ],
    "some experts of a layer": [
        sx.Rule("experts/up", sx.Bone(rank=4, grouping="contiguous"), layers=(1,), experts=(0,))
    ],
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", nightly_unless(["three methods"], OURS))
def test_our_files_give_our_logits_in_peft(pair, name, tmp_path):
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, OURS[name])
    adapters = shaken(adapters)
    save_peft(tmp_path, pair.ours, params, adapters)
    ours = our_logits(pair.ours, params, adapters)
    assert relative(ours, torch_logits(reloaded(pair, tmp_path))) < TOLERANCE
    assert relative(ours, torch_logits(pair.torch)) > 1e-3
    second = load_peft(tmp_path, pair.ours)
    np.testing.assert_allclose(our_logits(pair.ours, *second), ours, atol=1e-4)


REFUSED = {
    "no factors": ([("experts/up", sx.Bat(rank=8))], "Bat has no thin factors"),
    "two kinds": ([("experts/up", sx.LoRA(rank=2)), ("q_proj", sx.IA3())], "by LoRA alone, and other kernels have IA3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_has_no_place_for(pair, name, tmp_path):
    rules, message = REFUSED[name]
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
    with pytest.raises(sx.SboraxError, match=message):
        save_peft(tmp_path / "out", pair.ours, params, adapters)
    assert not (tmp_path / "out").exists()


def test_parameters_that_are_not_experts(pair, tmp_path):
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("experts/up", sx.LoRA(rank=2))])
    save_peft(tmp_path, pair.ours, params, adapters)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_parameters": ["q_proj.weight"]}))
    with pytest.raises(sx.SboraxError, match="target_parameters: this model has no parameter 'q_proj.weight'"):
        load_peft(tmp_path, pair.ours)
    file.write_text(json.dumps(config | {"fan_in_fan_out": True}))
    with pytest.raises(sx.SboraxError, match="PEFT has no target_parameters with it"):
        load_peft(tmp_path, pair.ours)
    file.write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(sx.SboraxError, match="has shape"):
        load_peft(tmp_path, pair.ours)
