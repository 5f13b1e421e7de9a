"""Rows of the embedding and of the head beside an adapter: PEFT's `trainable_token_indices`, there and back."""

import json

import jax.numpy as jnp
import numpy as np
import peft
import pytest
from nightly import nightly_unless
from safetensors.numpy import load_file
from torch_pair import TOKENS, build, logits, reloaded, torch_logits, with_peft

import sborax as sx
from sborax.adapters.leaves import flatten, replace_leaves
from sborax.interop.peft import load_peft, save_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
    "ignore:ensure_weight_tying=True but the model does not have tied weights:UserWarning",
    "ignore:You have requested `ensure_weight_tying`:UserWarning",
)
FIELD, DELTA = "trainable_token_indices", "token_adapter.trainable_tokens_delta"
EMBEDDING, HEAD = f"base_model.model.model.embed_tokens.{DELTA}", f"base_model.model.lm_head.{DELTA}"
ROWS, OTHERS = ([int(token) for token in TOKENS[0, places]] for places in ([4, 0, 2], [1, 3]))
TABLE, KERNEL = "embed_tokens/embedding", "lm_head/kernel"
LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
CASES = {
    "list": ("untied", ROWS, {}, {EMBEDDING}),
    "names": ("untied", {"embed_tokens": ROWS}, {}, {EMBEDDING}),
    "a full name": ("untied", {"model.embed_tokens": ROWS}, {}, {EMBEDDING}),
    "head": ("untied", {"lm_head": ROWS}, {}, {HEAD}),
    "both": ("untied", {"embed_tokens": ROWS, "lm_head": OTHERS}, {}, {EMBEDDING, HEAD}),
    "beside an adapted head": ("untied", ROWS, {"target_modules": ["lm_head", "q_proj"]}, {EMBEDDING}),
    "beside a saved head": ("untied", ROWS, {"modules_to_save": ["lm_head"]}, {EMBEDDING}),
    "tied, list": ("tied", ROWS, {}, {EMBEDDING}),
    "tied, names": ("tied", {"embed_tokens": ROWS}, {"ensure_weight_tying": True}, {EMBEDDING}),
    "tied, both": ("tied", {"embed_tokens": ROWS, "lm_head": ROWS}, {}, {EMBEDDING}),
    "tied, beside an adapted head": ("tied", ROWS, {"target_modules": ["lm_head", "q_proj"]}, {EMBEDDING}),
}
FEW = ("both", "tied, list")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return {
        name: build(tmp_path_factory.mktemp(name), tie_word_embeddings=name == "tied") for name in ("untied", "tied")
    }


@pytest.mark.parametrize("name", nightly_unless(FEW, CASES))
def test_files_both_ways(name, pairs, tmp_path):
    """PEFT's file gives PEFT's logits here, and has the same form and logits when written by us."""
    model, indices, changes, tensors = CASES[name]
    pair, config = pairs[model], peft.LoraConfig(**{**LORA, **changes}, trainable_token_indices=indices)
    theirs = with_peft(pair, config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)
    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    without = {path: leaf for path, leaf in flatten(pair.ours.params).items() if path in (TABLE, KERNEL)}
    assert np.abs(expected - logits(pair.ours, replace_leaves(params, without), adapters)).max() > 0.05
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, rtol=0, atol=1e-4)
    save_peft(tmp_path / "ours", pair.ours, params, adapters)
    stored = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {name for name in stored if DELTA in name} == tensors
    assert not any(name.endswith("embed_tokens.weight") for name in stored)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, rtol=0, atol=1e-4)
    print(f"{name}: logits within {np.abs(logits(pair.ours, params, adapters) - expected).max():.1e}")


REFUSED = {
    "an adapted embedding": ("untied", ROWS, {"target_modules": ["embed_tokens"]}, "model.embed_tokens: it has an adapter"),
}
