"""PEFT's kinds without adapters: norms, biases and rows of the embedding, there and back."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from safetensors.numpy import load_file
from torch_pair import TOKENS, build, logits, reloaded, torch_logits, with_peft

import sborax as sx
from sborax.adapters.leaves import flatten, replace_leaves
from sborax.interop.peft import load_peft, save_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Unsupported layer type '.*LlamaRMSNorm':UserWarning",
)
PLACES = [int(token) for token in TOKENS[0, [4, 0, 2]]]
ROWS = peft.TrainableTokensConfig(token_indices=PLACES)
CASES = {
    "norms": ("plain", peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "norms of a layer": ("plain", peft.LNTuningConfig(target_modules=r".*\.1\.\w+norm")),
    "biases": ("biased", peft.BeftConfig(target_modules=["v_proj", "down_proj"])),
    "tokens": ("plain", ROWS),
    "tokens of a tied head": ("tied", ROWS),
}
MODELS = {"plain": {}, "biased": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True}}


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    return {name: build(tmp_path_factory.mktemp(name), **fields) for name, fields in MODELS.items()}


@pytest.mark.parametrize("name", CASES)
def test_files_both_ways(name, pair_of, tmp_path):
    """PEFT's file gives PEFT's logits here; written by us it gives them in PEFT again."""
    pair, config = pair_of[CASES[name][0]], copy.deepcopy(CASES[name][1])
    theirs = with_peft(pair, config)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(pair.torch)).max() > 0.01
    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    assert adapters == {}
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, rtol=0, atol=1e-4)
    exported = save_peft(tmp_path / "ours", pair.ours, params, adapters)
    assert exported.peft_type == config.peft_type.value and exported.errors == {}
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, rtol=0, atol=1e-4)


def test_only_rows_that_were_trained_are_written(pair_of, tmp_path):
    model = pair_of["plain"].ours
    table = model.params["embed_tokens"]["embedding"]
    params = replace_leaves(model.params, {"embed_tokens/embedding": table.at[jnp.array([7, 2])].add(0.5)})
    assert save_peft(tmp_path, model, params, {}).parameters == 2 * 32
    assert json.loads((tmp_path / "adapter_config.json").read_text())["token_indices"] == [2, 7]
    (rows,) = load_file(tmp_path / "adapter_model.safetensors").values()
    np.testing.assert_array_equal(rows, table[jnp.array([2, 7])] + 0.5)


REFUSED = {
    "a kernel": (peft.LNTuningConfig(target_modules=["q_proj"]), {}, "q_proj: only norms can have it"),
    "no bias": (peft.BeftConfig(target_modules=["v_proj"]), {}, "v_proj: only projections with a bias can have it"),
    "more modules": (CASES["norms"][1], {"modules_to_save": ["lm_head"]}, "option modules_to_save"),
    "no such token": (ROWS, {"token_indices": [3, 5, -1]}, "token_indices: expected distinct tokens in 0..63"),
    "a larger vocabulary": (ROWS, {"token_indices": [3, 5, 64]}, "has 64 tokens; give sx.resize_vocabulary(model, n)"),
    "a token twice": (ROWS, {"token_indices": [3, 3, 5]}, "token_indices: expected distinct tokens"),
    "another count": (ROWS, {"token_indices": [3, 5]}, "config and model say (2, 32)"),
    "no tokens": (ROWS, {"token_indices": []}, "token_indices: expected distinct tokens"),
}


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term:UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, pair_of, tmp_path):
    pair, (config, changes, message) = pair_of["plain"], REFUSED[name]
    peft.get_peft_model(copy.deepcopy(pair.torch), copy.deepcopy(config)).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(sx.SboraxError) as caught:
        load_peft(tmp_path, pair.ours)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_several_parts_without_an_adapter_have_no_kind(pair_of, tmp_path):
    model = pair_of["plain"].ours
    changes = {path: leaf + 1.0 for path, leaf in flatten(model.params).items() if not path.endswith("kernel")}
    with pytest.raises(sx.SboraxError, match="were trained without an adapter: .* merge instead"):
        save_peft(tmp_path / "out", model, replace_leaves(model.params, changes), {})
    with pytest.raises(sx.SboraxError, match="there are no adapters; save"):
        save_peft(tmp_path / "out", model, jax.tree.map(lambda leaf: leaf + 1.0, model.params), {}, as_="lora")
    assert not (tmp_path / "out").exists()
