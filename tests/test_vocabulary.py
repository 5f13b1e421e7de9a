"""Larger and smaller vocabularies: models are transformers', and PEFT's files with embedding layers are read."""

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
from safetensors.numpy import load_file, save_file
from sborax_models import make, relative
from sborax_models import torch_logits as logits_of
from tiny_model import write_data, write_model
from torch_pair import build, shake, shaken

import sborax as sx
from sborax.adapters.leaves import flatten, replace_leaves
from sborax.cli.main import main
from sborax.models.load import load_model
from sborax.train.loop import train

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
    "ignore:ensure_weight_tying=True but the model does not have tied weights:UserWarning",
    "ignore:You have requested `ensure_weight_tying`:UserWarning",
    "ignore:Unsupported layer type '.*LlamaRMSNorm':UserWarning",
)
SIZE = 70
IDS = np.asarray([[3, 65, 12, 69, 40, 64], [66, 1, 67, 9, 68, 5]], np.int32)
TABLE, KERNEL = "embed_tokens/embedding", "lm_head/kernel"
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return {
        name: build(tmp_path_factory.mktemp(name), tie_word_embeddings=name == "tied") for name in ("untied", "tied")
    }


def torch_resized(pair, size=SIZE, seed=5):
    """The torch model as a user of PEFT resizes it; new rows are drawn."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(pair.path).eval()
    model.resize_token_embeddings(size)
    return model


def torch_logits(model):
    return logits_of(model, IDS)


def logits(model, params, adapters):
    return np.asarray(jax.jit(model.apply)(params, adapters, IDS))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_new_rows_are_the_mean_and_the_model_is_that_of_transformers(name, pairs, tmp_path):
    model = pairs[name].ours
    larger = sx.resize_vocabulary(model, SIZE)
    assert larger.config.vocab_size == SIZE and jax.tree.map(jnp.shape, larger.params) == jax.tree.map(
        jnp.shape, larger.abstract()
    )
    start, end = flatten(model.params), flatten(larger.params)
    assert (KERNEL in end) == (name == "untied")
    for path, table in end.items():
        if path not in (TABLE, KERNEL):
            assert table is start[path]
            continue
        old, new = (leaf if path == TABLE else leaf.T for leaf in (start[path], table))
        np.testing.assert_array_equal(new[:64], old)
        np.testing.assert_allclose(new[64:], np.broadcast_to(old.mean(axis=0), (6, 32)), rtol=0, atol=1e-7)
    # transformers draws its new rows that near the mean.
    theirs = torch_resized(pairs[name])
    assert np.abs(logits(larger, larger.params, None) - torch_logits(theirs)).max() < 1e-2
    sx.save_hf(tmp_path, larger, larger.params)
    second = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert second.config.vocab_size == SIZE
    np.testing.assert_allclose(torch_logits(second), logits(larger, larger.params, None), rtol=0, atol=1e-5)


def test_sizes_and_draws(pairs):
    model = pairs["untied"].ours
    for size, multiple, count in [(65, 16, 80), (64, 1, 64), (10, 1, 10), (64, 128, 128)]:
        resized = sx.resize_vocabulary(model, size, multiple=multiple)
        assert resized.params["lm_head"]["kernel"].shape == (32, count)
        np.testing.assert_array_equal(
            resized.params["embed_tokens"]["embedding"][:10], model.params["embed_tokens"]["embedding"][:10]
        )
    draws, mean = (sx.resize_vocabulary(model, 4064, key=key).params for key in (jax.random.key(0), None))
    for path in (TABLE, KERNEL):
        rows, means = (flatten(params)[path] if path == TABLE else flatten(params)[path].T for params in (draws, mean))
        expected, deviations = np.cov(rows[:64].T, bias=True), (rows - means)[64:]
        covariance = deviations.T @ deviations / 4000 / 1e-9
        assert np.abs(covariance - expected).max() < 0.15 * np.abs(expected).max()


def test_refused_sizes(pairs, tmp_path):
    model = pairs["untied"].ours
    for size, multiple, says in [
        (0, 1, "size and multiple must be 1 or more"),
        (8, 0, "size and multiple must be 1 or more"),
        (2, 1, "is no token of a vocabulary of 2"),
        (1 << 24, 1, "vocab_size must be at most"),
    ]:
        with pytest.raises(sx.SboraxError, match=says):
            sx.resize_vocabulary(model, size, multiple=multiple)
    tiny = load_model(write_model(tmp_path / "model"))
    with pytest.raises(sx.SboraxError, match="resize_vocabulary: the tokenizer's .* vocab_size is 200"):
        sx.resize_vocabulary(tiny, 200)


LORA = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}
ROWS = [3, 65, 40]
BOTH = {"modules_to_save": ["embed_tokens", "lm_head"]}
KINDS = {
    "LoRA": peft.LoraConfig(**LORA),
    "saved": peft.LoraConfig(**LORA, **BOTH),
    "embedding saved": peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "rows": peft.LoraConfig(**LORA, trainable_token_indices=ROWS),
    "rows of both": peft.LoraConfig(**LORA, trainable_token_indices={"embed_tokens": ROWS, "lm_head": ROWS}),
    "both adapted": peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "kept tied": peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "both saved and kept tied": peft.LoraConfig(**LORA, **BOTH, ensure_weight_tying=True),
    "adapted and kept tied": peft.LoraConfig(
        **{**LORA, "target_modules": ["q_proj", "embed_tokens"]}, ensure_weight_tying=True
    ),
    "adapted embedding beside saved head": peft.LoraConfig(
        **{**LORA, "target_modules": ["q_proj", "embed_tokens"]}, modules_to_save=["lm_head"]
    ),
    "rows beside an adapted head": peft.LoraConfig(
        **{**LORA, "target_modules": ["q_proj", "lm_head"]}, trainable_token_indices=ROWS
    ),
    "DoRA": peft.LoraConfig(**LORA, use_dora=True),
    "MISS": peft.MissConfig(r=4, target_modules=["q_proj"]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": peft.VeraConfig(r=3, target_modules=["q_proj"]),
    "Uni-LoRA": peft.UniLoraConfig(r=2, theta_d_length=16, target_modules=["q_proj"], save_indices=False),
    "KaSA of the head": peft.LoraConfig(r=3, target_modules=["lm_head"], kasa_config=peft.KasaConfig()),
    "norms": peft.LNTuningConfig(target_modules=["norm"]),
    "tokens": peft.TrainableTokensConfig(token_indices=ROWS),
}
NOT_TIED = ("saved", "embedding saved", "adapted embedding beside saved head", "KaSA of the head")
CASES = [(name, model) for name in KINDS for model in ("untied", "tied") if model == "untied" or name not in NOT_TIED]
FEW = [("saved", "untied"), ("rows", "tied"), ("LoRA", "tied")]


def saved_by_peft(pair, config, directory, size=SIZE, **options):
    """PEFT's adapter of the resized model, every trained tensor moved, and its logits."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(torch_resized(pair, size), copy.deepcopy(config))
    shake(theirs)
    theirs.eval()
    theirs.save_pretrained(directory, **options)
    return torch_logits(theirs)


def in_peft(pair, directory, seed=5):
    """A file on the base, resized anew."""
    return torch_logits(peft.PeftModel.from_pretrained(torch_resized(pair, seed=seed), directory).eval())


@pytest.mark.parametrize("case", nightly_unless(FEW, CASES), ids=", ".join)
def test_files_of_a_larger_vocabulary_both_ways(case, pairs, tmp_path):
    """PEFT's file gives PEFT's logits here. Ours with the layers gives them in PEFT, whatever rows it draws."""
    name, pair = case[0], pairs[case[1]]
    saved_by_peft(pair, KINDS[name], tmp_path / "theirs", save_embedding_layers=True)
    expected = in_peft(pair, tmp_path / "theirs")
    with pytest.raises(sx.SboraxError) as caught:
        sx.load_peft(tmp_path / "theirs", pair.ours)
    assert "give sx.resize_vocabulary(model, 70)" in str(caught.value) and "\n" not in str(caught.value)
    # Of an adapted module alone PEFT stores that module; the other one is as the model was resized.
    larger = as_resized(pair, sx.resize_vocabulary(pair.ours, SIZE))
    params, adapters = sx.load_peft(tmp_path / "theirs", larger)
    np.testing.assert_allclose(logits(larger, params, adapters), expected, rtol=0, atol=1e-4)
    sx.save_peft(tmp_path / "ours", larger, params, adapters, save_embedding_layers=True)
    assert f"sx.resize_vocabulary(model, {SIZE})" in (tmp_path / "ours" / "README.md").read_text()
    np.testing.assert_allclose(in_peft(pair, tmp_path / "ours", seed=6), expected, rtol=0, atol=1e-4)
    params, adapters = sx.load_peft(tmp_path / "ours", sx.resize_vocabulary(pair.ours, SIZE))
    np.testing.assert_allclose(logits(larger, params, adapters), expected, rtol=0, atol=1e-4)


def as_resized(pair, larger):
    """`larger` with the rows that `torch_resized` draws."""
    theirs = torch_resized(pair)
    new = {TABLE: jnp.asarray(theirs.get_input_embeddings().weight.detach().numpy())}
    if KERNEL in flatten(larger.params):
        new[KERNEL] = jnp.asarray(theirs.get_output_embeddings().weight.detach().numpy().T)
    return type(larger)(larger.module, replace_leaves(larger.params, new), larger.config, larger.tokenizer)


REFUSED = {
    "a tied pair that was trained apart": (KINDS["saved"], {}, "lm_head.weight differs from the embedding, to which"),
    "a tied embedding alone": (KINDS["embedding saved"], {}, "modules_to_save has the embedding, to which the head is"),
    "a tied head alone": (peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), {}, "the head, which is tied here;"),
    "unequal copies": (KINDS["LoRA"], {"lm_head.weight": 1.0}, "lm_head.weight differs from the embedding, to which"),
    "unequal tables beside rows": (
        KINDS["rows"],
        {"lm_head.token_adapter.base_layer.weight": 1.0},
        "lm_head.token_adapter.base_layer.weight differs from the embedding",
    ),
    "unequal rows": (
        KINDS["rows"],
        {"lm_head.token_adapter.trainable_tokens_delta": 1.0},
        "lm_head.token_adapter.trainable_tokens_delta differs from the embedding",
    ),
    "unequal copies of a saved module": (
        KINDS["kept tied"],
        {"model.embed_tokens.modules_to_save.weight": 1.0},
        "model.embed_tokens.modules_to_save.weight differs from base_model.model.model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("name", nightly_unless(["unequal copies", "a tied pair that was trained apart"], REFUSED))
def test_a_tied_head_that_is_not_the_embedding(name, pairs, tmp_path):
    config, changes, says = REFUSED[name]
    saved_by_peft(pairs["tied"], config, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, **{PREFIX + key: tensors[PREFIX + key] + by for key, by in changes.items()}}, file)
    with pytest.raises(sx.SboraxError) as caught:
        sx.load_peft(tmp_path, sx.resize_vocabulary(pairs["tied"].ours, SIZE))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", nightly_unless([64], [64, 48]))
def test_layers_of_an_equal_and_of_a_smaller_vocabulary(size, pairs, tmp_path):
    """Layers of a base that is not ours are read all the same, and written as trained."""
    pair = pairs["untied"]
    base = torch_resized(pair, size)
    with torch.no_grad():
        base.get_input_embeddings().weight *= 1.1
    theirs = peft.get_peft_model(base, peft.LoraConfig(**LORA, init_lora_weights=False)).eval()
    ids = IDS % size
    expected = logits_of(theirs, ids)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    model = pair.ours if size == 64 else sx.resize_vocabulary(pair.ours, size)
    if size != 64:
        with pytest.raises(sx.SboraxError, match=r"give sx.resize_vocabulary\(model, 48\)"):
            sx.load_peft(tmp_path / "theirs", pair.ours)
    params, adapters = sx.load_peft(tmp_path / "theirs", model)
    np.testing.assert_allclose(jax.jit(model.apply)(params, adapters, ids), expected, rtol=0, atol=1e-4)
    for layers in (False, True):
        sx.save_peft(tmp_path / str(layers), model, params, adapters, save_embedding_layers=layers)
        config = json.loads((tmp_path / str(layers) / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["model.embed_tokens"]
        assert (f"{PREFIX}lm_head.weight" in load_file(tmp_path / str(layers) / "adapter_model.safetensors")) == layers
        back = peft.PeftModel.from_pretrained(torch_resized(pair, size), tmp_path / str(layers)).eval()
        np.testing.assert_allclose(logits_of(back, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", nightly_unless([], [sx.PiSSA(rank=2), sx.SBoRA(rank=4), sx.Bone(rank=4)]))
def test_layers_beside_plain_lora(method, pairs, tmp_path):
    """The head in the file is the base's, also where a method took its start out of ours."""
    pair, larger = pairs["untied"], sx.resize_vocabulary(pairs["untied"].ours, SIZE)
    params, adapters = sx.attach(jax.random.key(0), larger.params, [("q_proj|lm_head", method)])
    adapters = shaken(adapters)
    sx.save_peft(tmp_path, larger, params, adapters, as_="lora", rank=32, save_embedding_layers=True)
    np.testing.assert_allclose(in_peft(pair, tmp_path), logits(larger, params, adapters), rtol=0, atol=1e-4)
    params, adapters = sx.load_peft(tmp_path, larger)
    np.testing.assert_allclose(logits(larger, params, adapters), in_peft(pair, tmp_path), rtol=0, atol=1e-4)


def test_added_tokens_are_trained_and_exported(tmp_path):
    """A run on a model with two more tokens trains their vectors, and PEFT reads them on the base, resized likewise."""
    place = write_model(tmp_path / "model")
    model = load_model(place)
    assert model.tokenizer.add_tokens(["<think>", "</think>"]) == 2
    larger = sx.resize_vocabulary(model, len(model.tokenizer))
    sx.save_hf(tmp_path / "larger", larger, larger.params)
    second = load_model(tmp_path / "larger")
    added = second.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert added == [258, 259] and second.config.vocab_size == 260
    rows = [
        {"instruction": f"{number}?", "input": "", "output": f"<think>{number}</think>{number}."} for number in range(8)
    ]
    data = write_data(tmp_path / "data.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    experiment = sx.Experiment(
        str(tmp_path / "larger"),
        sx.Data(str(data), template="{instruction}", answer=" {output}", max_length=32, buckets=(32,)),
        rules=[("q_proj", sx.LoRA(rank=4))],
        train_tokens=tuple(added),
        optimizer=sx.Optimizer(lr=1e-2, schedule="constant", warmup=0),
        steps=3,
        batch_size=2,
    )
    train(experiment, tmp_path / "run")
    params, adapters = sx.load_adapter(tmp_path / "run" / "adapter", second.params)
    changes = np.abs(params["embed_tokens"]["embedding"] - second.params["embed_tokens"]["embedding"]).max(axis=1)
    assert np.flatnonzero(changes).tolist() == added
    sx.save_peft(tmp_path / "peft", second, params, adapters)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["trainable_token_indices"] == added
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place)
    theirs.resize_token_embeddings(260)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    ids = np.asarray([[5, 258, 40, 259, 7]], np.int32)
    np.testing.assert_allclose(jax.jit(second.apply)(params, adapters, ids), logits_of(theirs, ids), rtol=0, atol=1e-4)
    # With the layers from the command line, the base's new rows may be any. The card says how to load both.
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "layers"), "--save-embedding-layers"]) == 0
    tensors = load_file(tmp_path / "layers" / "adapter_model.safetensors")
    assert tensors[f"{PREFIX}model.embed_tokens.token_adapter.base_layer.weight"].shape == (260, 32)
    for name in ("peft", "layers"):
        card = (tmp_path / name / "README.md").read_text()
        assert "model.resize_token_embeddings(260)" in card and "sx.resize_vocabulary(model, 260)" in card
    sx.save_peft(tmp_path / "plain", second, second.params, adapters)
    assert "resize" not in (tmp_path / "plain" / "README.md").read_text()


FAMILIES = {
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4},
    "nf4": {"hidden_size": 64, "intermediate_size": 128},
}


@pytest.mark.nightly
@pytest.mark.parametrize("kind", FAMILIES)
def test_families_and_codes_of_four_bits(kind, tmp_path):
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    make("llama" if kind == "nf4" else kind, tmp_path / "model", **ends, **FAMILIES[kind])
    model = load_model(tmp_path / "model", quant="nf4" if kind == "nf4" else None)
    torch.manual_seed(0)
    larger = sx.resize_vocabulary(model, 101)
    sx.save_hf(tmp_path / "larger", larger, larger.params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "larger").eval()
    ids = np.asarray([[3, 100, 12, 96, 40, 98, 5, 7, 9]], np.int32)
    assert relative(jax.jit(larger.apply)(larger.params, None, ids), logits_of(theirs, ids)) < 1e-5
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    base.resize_token_embeddings(101)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["o_proj"]))
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    params, adapters = sx.load_peft(tmp_path / "theirs", larger)
    got = jax.jit(larger.apply)(params, adapters, ids)
    if kind == "nf4":
        np.testing.assert_array_equal(
            params["embed_tokens"]["embedding"], theirs.get_input_embeddings().weight.detach().numpy()
        )
        assert np.isfinite(got).all()
    else:
        assert relative(got, logits_of(theirs, ids)) < 1e-5
