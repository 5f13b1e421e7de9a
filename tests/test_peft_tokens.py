"""Rows of the embedding and of the head beside an adapter: PEFT's `trainable_token_indices`, there and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
from nightly import nightly_unless
from safetensors.numpy import load_file
from sborax_models import make
from torch_pair import TOKENS, Pair, build, logits, reloaded, torch_logits, with_peft

import sborax as sx
from sborax.adapters.leaves import flatten, replace_leaves
from sborax.interop.peft import load_peft, save_peft
from sborax.models.load import load_model

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
    "another module": ("untied", {FIELD: {"wte": ROWS}}, "this model has no module 'wte'"),
    "a norm": ("untied", {FIELD: {"model.norm": [1]}}, "of model.norm: it is no embedding and no projection"),
    "a module twice": (
        "untied",
        {FIELD: {"embed_tokens": ROWS, "tokens": ROWS}},
        "has the rows of model.embed_tokens twice",
    ),
    "an adapted module": ("untied", {FIELD: {"q_proj": [1]}}, "q_proj: it has an adapter, beside which PEFT trains no"),
    "an adapted embedding": (
        "tied",
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
        "of model.embed_tokens: it has an adapter",
    ),
    "a saved embedding": ("untied", {"modules_to_save": ["embed_tokens"]}, "it is in modules_to_save, beside which"),
    "a tied head alone": ("tied", {FIELD: {"lm_head": ROWS}}, "the rows of lm_head are not those of the embedding"),
    "a tied head with others": ("tied", {FIELD: {"embed_tokens": ROWS, "lm_head": OTHERS}}, "the rows of lm_head are"),
    "no such token": ("untied", {FIELD: [3, -1]}, f"{FIELD}: expected distinct tokens in 0..63"),
    "a larger vocabulary": (
        "untied",
        {FIELD: [3, 64, 5]},
        f"{FIELD}: there is token 64, and this model has 64 tokens; give sx.resize_vocabulary(model, n)",
    ),
    "a token twice": ("untied", {FIELD: [3, 3, 5]}, f"{FIELD}: expected distinct tokens"),
    "no tokens": ("untied", {FIELD: []}, f"{FIELD}: expected distinct tokens"),
    "another count": ("untied", {FIELD: ROWS[:2]}, "config and model say (2, 32)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, pairs, tmp_path):
    """A file of PEFT's, whose config was changed."""
    model, changes, message = REFUSED[name]
    with_peft(pairs[model], peft.LoraConfig(**LORA, trainable_token_indices=ROWS)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(sx.SboraxError) as caught:
        load_peft(tmp_path, pairs[model].ours)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    return build(tmp_path_factory.mktemp("biased"), mlp_bias=True)


@pytest.mark.nightly
def test_rows_of_other_projections(pairs, biased, tmp_path):
    """They are read, and written with the whole kernel. PEFT drops the bias of such a projection, which is refused."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices={"1.mlp.up_proj": [3, 40]})
    pair, theirs = pairs["untied"], with_peft(pairs["untied"], config)
    expected = torch_logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, rtol=0, atol=1e-4)
    save_peft(tmp_path / "ours", pair.ours, params, adapters)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, rtol=0, atol=1e-4)
    with pytest.raises(sx.SboraxError, match="of model.layers.1.mlp.up_proj: PEFT drops its bias"):
        load_peft(tmp_path / "theirs", biased.ours)


OTHER_MODELS = {
    "phi3": ({}, {"target_modules": ["qkv_proj", "o_proj"]}),
    "qwen3_moe": (
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_beside_adapters_of_joint_projections_and_of_experts(kind, tmp_path):
    sizes, targets = OTHER_MODELS[kind]
    fields = {"num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, **sizes}
    reference = make(kind, tmp_path / "model", **fields)
    pair = Pair(reference, load_model(tmp_path / "model"), tmp_path / "model")
    theirs = with_peft(pair, peft.LoraConfig(r=3, **targets, trainable_token_indices=ROWS))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)
    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, rtol=0, atol=1e-4)
    save_peft(tmp_path / "ours", pair.ours, params, adapters)
    assert EMBEDDING in load_file(tmp_path / "ours" / "adapter_model.safetensors")
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, rtol=0, atol=1e-4)


def with_rows(model, count):
    """The parameters with so many rows of the embedding moved, and a LoRA."""
    table = model.params["embed_tokens"]["embedding"]
    params = replace_leaves(model.params, {TABLE: table.at[jnp.arange(count)].add(0.5)})
    return sx.attach(jax.random.key(0), params, [("q_proj", sx.LoRA(rank=2))])


def test_at_most_half_of_the_rows_are_written_as_rows(pairs, tmp_path):
    model = pairs["tied"].ours
    for count in (1, 32, 33):
        save_peft(tmp_path / str(count), model, *with_rows(model, count))
        config = json.loads((tmp_path / str(count) / "adapter_config.json").read_text())
        assert config.get("modules_to_save") == (["model.embed_tokens"] if count == 33 else None)
        assert config.get(FIELD) == (None if count == 33 else list(range(count)))
        card = (tmp_path / str(count) / "README.md").read_text()
        assert (FIELD in card) == (count < 33) and ("Stored in full: model.embed_tokens" in card) == (count == 33)
        np.testing.assert_array_equal(
            load_peft(tmp_path / str(count), model)[0]["embed_tokens"]["embedding"],
            with_rows(model, count)[0]["embed_tokens"]["embedding"],
        )


def test_kinds_without_the_field_have_the_whole_embedding(pairs, tmp_path):
    model = pairs["untied"].ours
    params, adapters = with_rows(model, 2)[0], sx.attach(jax.random.key(0), model.params, [("q_proj", sx.IA3())])[1]
    save_peft(tmp_path, model, params, adapters)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.embed_tokens"] and FIELD not in config
