"""Every family of the table against transformers: logits, text, saved models, adapters, and what is refused."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from nightly import nightly_unless
from sborax_models import TINY, make, relative, tokens_of, torch_logits
from tiny_gguf import write_gguf
from tiny_model import write_data, write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch_pair import TOKENS, Pair, reloaded, shaken
from torch_pair import torch_logits as pair_logits
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.cli import main
from sborax.data.samples import load_samples
from sborax.data.template import prompt_of
from sborax.interop.peft import load_peft, save_peft
from sborax.layout.sharding import Layout
from sborax.layout.state import flatten, selected, start, take_apart
from sborax.models import LanguageModel, Llama, LlamaConfig, abstract, generate, load_config, load_model, save_hf
from sborax.models.decoder import active_width
from sborax.models.families import FAMILIES
from sborax.models.nf4 import NF4Array
from sborax.plans.ahead import outline
from sborax.train.figures import model_flops
from sborax.train.step import make_step

TOLERANCE = 1e-5
"""Of the largest logit, in float32."""
WINDOW = 48
ENDS = [1, 2]
FIELDS = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "gemma": {"head_dim": 12, "num_key_value_heads": 1},
    # Windows shorter than the text, and caps that scores reach.
    "gemma2": {
        "head_dim": 12,
        "sliding_window": 7,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    # Both kinds of layers, each with a rotary embedding of its kind.
    "gemma3_text": {
        "head_dim": 12,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 20,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    },
    # As Phi-4-mini, but for the window, which is shorter than the text.
    "phi3": {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "sliding_window": 7,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 56,
        "rope_parameters": {
            "rope_type": "longrope",
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.3, 3.0],
            "long_factor": [9.0, 9.0, 9.0],
        },
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 3, "attention_bias": True},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "head_dim": 12,
        "tie_word_embeddings": True,
    },
}
ALL = [("self_attn|mlp", sx.LoRA(rank=2, alpha=4.0))]


SPARSE = [kind for kind, family in FAMILIES.items() if family.experts]


@pytest.fixture(
    scope="module",
    # What the families that are left out add to LLaMA is in one of the others, too.
    params=nightly_unless([*(FAMILIES.keys() - {*SPARSE, "mistral", "gemma"}), SPARSE[2]], FAMILIES),
)
def pair(request, tmp_path_factory):
    """A random torch model of the family, and ours read from its files."""
    place = tmp_path_factory.mktemp(request.param)
    fields = {"num_hidden_layers": 2, "eos_token_id": ENDS, **FIELDS[request.param]}
    with jax.numpy_dtype_promotion("strict"):
        return Pair(make(request.param, place, **fields), load_model(place), place)


@pytest.mark.usefixtures("strict")
def test_logits_equal_transformers(pair):
    tokens = tokens_of(pair.ours, 2, WINDOW)
    ours = jax.jit(pair.ours.apply)(pair.ours.params, None, tokens)
    assert relative(ours, torch_logits(pair.torch, tokens)) < TOLERANCE


@pytest.mark.usefixtures("strict")
def test_logits_on_a_mesh_equal_transformers(pair):
    layout = Layout.of({"fsdp": 2, "tensor": min(2, pair.ours.config.num_key_value_heads)}, 2)
    tokens = tokens_of(pair.ours, 2, 9)
    with layout.context():
        cut = load_model(pair.path, shardings=layout.of_params)
        ours = jax.jit(cut.apply)(cut.params, None, layout.batch(tokens, 0))
    assert relative(ours, torch_logits(pair.torch, tokens)) < TOLERANCE


def test_the_loss_equals_transformers(pair):
    """Of heads that are more than a product with a frozen table."""
    if pair.ours.module.plain_head:
        assert pair.ours.config.final_logit_softcapping is None
        return
    tokens = tokens_of(pair.ours, 2, WINDOW)
    batch = {"tokens": tokens[None, :, :-1], "targets": tokens[None, :, 1:]}
    ones = jnp.ones(batch["tokens"].shape, jnp.int32)
    parts = take_apart(*sx.attach(jax.random.key(0), pair.ours.params, ALL))
    trained = {"adapters": parts.adapters, "base": {}}
    batch |= {"counts": ones > 0, "segments": ones}
    sums, _ = sx.forward_backward(pair.ours, trained, parts.frozen, parts.base, batch, jax.random.key(1))
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
    with torch.no_grad():
        expected = float(pair.torch(ids, labels=ids).loss)
    assert math.isclose(float(sums.losses["loss"] / sums.items), expected, rel_tol=1e-5)


def test_the_load_of_experts_equals_transformers(pair):
    """With padding, which counts for nothing."""
    if pair.ours.config.experts is None:
        with pytest.raises(sx.SboraxError, match="experts: .* needs config.Experts"):
            dataclasses.replace(pair.ours.config, model_type="mixtral")
        return
    tokens = tokens_of(pair.ours, 2, 9)
    mask = np.ones((2, 9), np.int32)
    mask[1, 6:] = 0
    _, collected = pair.ours.collect(pair.ours.params, None, tokens, ["load"], segment_ids=jnp.asarray(mask))
    with torch.no_grad():
        theirs = pair.torch(
            torch.tensor(np.asarray(tokens), dtype=torch.long),
            attention_mask=torch.tensor(mask),
            output_router_logits=True,
        )
    assert math.isclose(float(collected.load.imbalance()), float(theirs.aux_loss), rel_tol=1e-5)
    # transformers has the z-loss for other families.
    logits = torch.stack(theirs.router_logits)[:, mask.reshape(-1) == 1]
    assert math.isclose(float(collected.load.z_loss()), float(router_z_loss_func(logits)), rel_tol=1e-5)


@pytest.mark.nightly
def test_the_losses_of_a_trained_router_equal_transformers(pair):
    """The gradient of the cross entropy with both losses of the router, each at its share."""
    if pair.ours.config.experts is None:
        return
    experts = dataclasses.replace(pair.ours.config.experts, balance=0.3, z_loss=0.2)
    config = dataclasses.replace(pair.ours.config, experts=experts)
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    model = LanguageModel(pair.ours.module, pair.ours.params, config, None)
    tokens = tokens_of(pair.ours, 2, 12)
    ones = jnp.ones((1, 2, 11), jnp.int32)
    batch = {"tokens": tokens[None, :, :-1], "targets": tokens[None, :, 1:], "counts": ones > 0, "segments": ones}
    parts = take_apart(*sx.attach(jax.random.key(0), model.params, [("o_proj", sx.LoRA(rank=2))]), False, ("router",))
    train = {"adapters": parts.adapters, "base": parts.trained_base}
    sums, grads = sx.forward_backward(model, train, parts.frozen, parts.base, batch, jax.random.key(1))
    ids = torch.tensor(np.asarray(tokens), dtype=torch.long)
    out = pair.torch(ids[:, :-1], output_router_logits=True)
    entropy = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten())
    loss = entropy + 0.3 * out.aux_loss + 0.2 * router_z_loss_func(torch.stack(out.router_logits))
    weights = [parameter for name, parameter in pair.torch.named_parameters() if name.endswith("mlp.gate.weight")]
    expected = np.stack([grad.numpy().T for grad in torch.autograd.grad(loss, weights)])
    assert math.isclose(float(sum(sums.losses.values()) / sums.items), float(loss.detach()), rel_tol=1e-5)
    assert set(sums.losses) == {"loss", "balance_loss", "z_loss"}
    assert relative(grads["base"]["layers/mlp/router/weight"], expected) < TOLERANCE


@pytest.mark.usefixtures("strict")
def test_greedy_text_equals_transformers(pair):
    prompts = np.asarray(tokens_of(pair.ours, 2, 9)).tolist()
    prompts[1] = prompts[1][:5]
    for prompt, new in zip(prompts, generate(pair.ours, pair.ours.params, None, prompts, 16), strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        theirs = pair.torch.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=0)
        assert new == theirs[0, len(prompt) :].tolist()


@pytest.mark.usefixtures("strict")
def test_texts_packed_or_padded_equal_transformers(pair):
    """The same 12 and 9 tokens in one row, and on either side of padding."""
    if not pair.ours.config.windows:
        return
    tokens = np.asarray(tokens_of(pair.ours, 21))
    first, second = tokens[:12], tokens[12:]
    rows = np.zeros((2, 21), np.int32)
    segments = np.array([[1] * 12 + [2] * 9, [0] * 5 + [1] * 12 + [0] * 4], np.int32)
    rows[0], rows[1, 5:17] = tokens, first
    out = jax.jit(pair.ours.apply)(pair.ours.params, None, jnp.asarray(rows), segment_ids=jnp.asarray(segments))
    parts = ((first, out[0, :12]), (second, out[0, 12:]), (first, out[1, 5:17]))
    for text, ours in parts:
        assert relative(ours, torch_logits(pair.torch, text[None])[0]) < TOLERANCE


@pytest.mark.usefixtures("strict")
def test_a_merged_model_loads_in_transformers(pair, tmp_path):
    """All seven projections of both layers adapted; layers unrolled."""
    model = load_model(pair.path, scan=False)
    params, adapters = sx.attach(jax.random.key(0), model.params, ALL)
    adapters = shaken(adapters)
    assert len(nodes(adapters)) == 2 * (10 if model.config.experts and model.config.experts.shared_size else 7)
    save_hf(tmp_path, model, jax.jit(sx.merge)(params, adapters))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(theirs).__name__ == model.config.family.causal_lm
    tokens = tokens_of(model, 2, 9)
    ours = jax.jit(model.apply)(params, adapters, tokens)
    assert relative(ours, torch_logits(theirs, tokens)) < TOLERANCE
    assert relative(ours, torch_logits(pair.torch, tokens)) > 1e-2
    assert load_config(tmp_path) == model.config


def test_configs_go_both_ways(pair):
    config = pair.ours.config
    assert config.eos_token_id == tuple(ENDS)
    assert LlamaConfig.from_hf(config.to_hf()) == config
    if config.experts or config.layer_types:
        with pytest.raises(sx.SboraxError, match="layers of unequal size cannot have"):
            dataclasses.replace(config, layer_sizes=((4, 1, 40), (2, 1, 8)))
        return
    unequal = dataclasses.replace(config, layer_sizes=((4, 1, 40), (2, 1, 8)), model_type=f"sborax_{config.model_type}")
    assert LlamaConfig.from_hf(unequal.to_hf()) == unequal and unequal.family is config.family


def published(kind, layers, hidden, width, heads, kv_heads, vocab, **fields):
    """What matters of a published `config.json`, or might."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
        **fields,
    }


SWITCHED_OFF = {"hidden_act": "silu", "use_sliding_window": False, "max_window_layers": 28}
GEMMA = {"hidden_act": "gelu", "hidden_activation": None, "attention_bias": False, "head_dim": 256}
PUBLISHED = {
    "Mistral-7B": published("mistral", 32, 4096, 14336, 32, 8, 32000, tie_word_embeddings=False),
    "Qwen2.5-0.5B": published(
        "qwen2", 24, 896, 4864, 14, 2, 151936, **SWITCHED_OFF, sliding_window=32768, tie_word_embeddings=True
    ),
    "Qwen3-0.6B": published(
        "qwen3", 28, 1024, 3072, 16, 8, 151936, **SWITCHED_OFF, attention_bias=False, tie_word_embeddings=True
    ),
    # Tied, although the file does not say so.
    "Gemma-2B": published("gemma", 18, 2048, 16384, 8, 1, 256000, **GEMMA),
    "Mixtral-8x7B": published(
        "mixtral", 32, 4096, 14336, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    ),
    # Its file leaves `layer_types` out: five windows, then full attention.
    "Gemma-3-1B": published(
        "gemma3_text",
        26,
        1152,
        6912,
        4,
        1,
        262144,
        head_dim=256,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        cache_implementation="hybrid",
        rope_local_base_freq=10000,
        sliding_window=512,
        sliding_window_pattern=6,
    )
    | {"rope_theta": 1000000},
    "Phi-4-mini": published(
        "phi3",
        32,
        3072,
        8192,
        24,
        8,
        200064,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        sliding_window=262144,
        bos_token_id=199999,
        eos_token_id=199999,
        pad_token_id=199999,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        lm_head_bias=False,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        full_attn_mod=1,
        interpolate_factor=1,
    )
    | {
        "max_position_embeddings": 131072,
        "rope_scaling": {"type": "longrope", "long_factor": [32.0] * 48, "short_factor": [1.0] * 48},
    },
    "OLMoE-1B-7B": published(
        "olmoe", 16, 2048, 1024, 16, 16, 50304, num_experts=64, num_experts_per_tok=8, clip_qkv=None
    ),
    "Qwen1.5-MoE-A2.7B": published(
        "qwen2_moe", 24, 2048, 5632, 16, 16, 151936, **SWITCHED_OFF, sliding_window=32768, decoder_sparse_step=1
    ),
    "Qwen3-30B-A3B": published(
        "qwen3_moe",
        48,
        2048,
        6144,
        32,
        4,
        151936,
        **SWITCHED_OFF,
        mlp_only_layers=[],
        head_dim=128,
        norm_topk_prob=True,
    ),
}


@pytest.mark.parametrize("name", nightly_unless(PUBLISHED.keys() - {"Gemma-2B", "OLMoE-1B-7B"}, PUBLISHED))
def test_plans_count_what_transformers_builds(name, tmp_path, capsys):
    raw = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert main(["plan", str(tmp_path / "config.json"), "--mesh", "fsdp=64", "--length", "512"]) == 0
    output = capsys.readouterr().out
    assert f"{theirs.num_parameters():,} parameters" in output and "bytes on each of 64 devices" in output
    config = load_config(tmp_path)
    plan = outline(sx.Experiment("x", sx.Data("x"), ALL, steps=1), config)
    d, wide = config.hidden_size, config.num_attention_heads * config.head_dim
    of_layer = 2 * d * (wide + config.num_key_value_heads * config.head_dim) + 3 * d * active_width(config)
    assert model_flops(config, plan.parts) == 4 * (config.num_hidden_layers * of_layer + d * config.vocab_size)


def test_keys_that_files_leave_out_are_those_of_transformers():
    bare = {key: value for key, value in PUBLISHED["Gemma-2B"].items() if key not in GEMMA}
    gemma = LlamaConfig.from_hf(bare)
    assert (gemma.head_dim, gemma.tie_word_embeddings, gemma.eos_token_id, gemma.bos_token_id) == (256, True, (1,), 2)
    bare = {key: value for key, value in PUBLISHED["Mistral-7B"].items() if key != "num_key_value_heads"}
    mistral = LlamaConfig.from_hf(bare)
    assert (mistral.num_key_value_heads, mistral.sliding_window, mistral.context) == (8, 4096, 4096)
    assert LlamaConfig.from_hf(PUBLISHED["Qwen3-0.6B"]).head_dim == 128
    assert LlamaConfig.from_hf(PUBLISHED["Qwen2.5-0.5B"]).context == 8192


REFUSED = {
    "biases": ("Mistral-7B", {"attention_bias": True}, "attention_bias = True is not supported, only False"),
    "window": ("Qwen2.5-0.5B", {"use_sliding_window": True}, "use_sliding_window = True is not supported, only False"),
    "layers": ("Qwen3-0.6B", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention.* only full"),
    "activation": ("Qwen3-0.6B", {"hidden_act": "gelu"}, "hidden_act = gelu is not supported, only silu"),
    "exact gelu": ("Gemma-2B", {"hidden_activation": "gelu"}, "hidden_activation = gelu .* only gelu_pytorch_tanh"),
    "both ways": ("Gemma-2B", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    "yarn": ("Qwen3-0.6B", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    "foreign": ("Qwen2.5-0.5B", {"attn_logit_softcapping": 50.0}, "unknown field 'attn_logit_softcapping'"),
    "another family": ("Qwen3-0.6B", {"model_type": "deepseek_v3"}, "'deepseek_v3' is not supported; known: llama, m"),
    "images": ("Qwen3-0.6B", {"model_type": "gemma3"}, "'gemma3' is not supported; .* save its text part as gemma3_te"),
    "scaled window": (
        "Gemma-3-1B",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "sliding_attention: rope type 'linear' is not supported, only default",
    ),
    "flat ropes": ("Gemma-3-1B", {"rope_parameters": {"rope_theta": 3.0}}, "an object for full_attention and sliding"),
    "capped scores": ("Gemma-3-1B", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 .* only None"),
    "part of a head": ("Qwen3-0.6B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    "odd part": ("Phi-4-mini", {"partial_rotary_factor": 0.9, "rope_scaling": None}, "that is rotated must be even"),
    "more than a head": ("Phi-4-mini", {"partial_rotary_factor": 2.0}, "partial_rotary_factor must be at most 1, got"),
    "few factors": (
        "Phi-4-mini",
        {"rope_scaling": {"type": "su", "long_factor": [1.0] * 48, "short_factor": [1.0] * 47}},
        "short_factor must be a list of 48 numbers",
    ),
    "linear Phi": ("Phi-4-mini", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' .* default, longrope"),
    "a head's bias": ("Phi-4-mini", {"lm_head_bias": True}, "lm_head_bias = True is not supported, only False"),
    "dense layers": ("Qwen3-30B-A3B", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported"),
    "some sparse": ("Qwen3-30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported, only 1"),
    "noise": ("Mixtral-8x7B", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1 is not supported, only 0.0"),
    "clipped": ("OLMoE-1B-7B", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported, only None"),
    "too many": ("OLMoE-1B-7B", {"num_experts_per_tok": 65}, r"num_experts_per_tok must lie in 1\.\.64, got 65"),
    "biases of q": ("Qwen1.5-MoE-A2.7B", {"qkv_bias": False}, "qkv_bias = False is not supported, only True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_are_refused(name):
    model, change, message = REFUSED[name]
    with pytest.raises(sx.SboraxError, match=message) as caught:
        LlamaConfig.from_hf(PUBLISHED[model] | change)
    assert "\n" not in str(caught.value)


ROUTED = {
    "mixtral": ("Mixtral-8x7B", {"router_jitter_noise": 0.1}, {"num_local_experts": 4}),
    "olmoe": ("OLMoE-1B-7B", {"clip_qkv": 8.0}, {"num_experts": 32, "norm_topk_prob": True}),
    "qwen2_moe": (
        "Qwen1.5-MoE-A2.7B",
        {"decoder_sparse_step": 2, "mlp_only_layers": [3], "qkv_bias": False, "use_sliding_window": True}
        | {"layer_types": ["full_attention", "sliding_attention"]},
        {"num_experts": 32, "norm_topk_prob": True, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": (
        "Qwen3-30B-A3B",
        {"decoder_sparse_step": 2, "mlp_only_layers": [3], "use_sliding_window": True},
        {"num_experts": 32, "norm_topk_prob": False, "moe_intermediate_size": 32},
    ),
}
"""By family: a model, and values of fields that LLaMA lacks: those that are refused, and those that are read."""
READ = {"num_experts_per_tok": 3, "router_aux_loss_coef": 0.5}
"""Fields of all of them that are read, and the field of each that changes nothing is `output_router_logits`."""


@pytest.mark.parametrize("kind", ROUTED)
def test_every_option_of_a_router_is_read_or_refused(kind):
    """A field that transformers' config has beyond LLaMA's, and that is not in the table, fails the test."""
    model, refused, read = ROUTED[kind]
    raw, read = PUBLISHED[model], read | READ
    theirs, plain = (
        {field.name for field in dataclasses.fields(type(transformers.AutoConfig.for_model(name)))}
        for name in (kind, "llama")
    )
    # Windows are refused by the switch, and Mixtral's is that of Mistral.
    assert theirs - plain == {*refused, *read, "output_router_logits"} | (
        theirs & {"sliding_window", "max_window_layers"}
    )
    for field, value in refused.items():
        with pytest.raises(sx.SboraxError, match=f"config.json: {field} = ") as caught:
            LlamaConfig.from_hf(raw | {field: value})
        assert "\n" not in str(caught.value)
    default = LlamaConfig.from_hf(raw)
    for field, value in read.items():
        config = LlamaConfig.from_hf(raw | {field: value})
        assert config.experts != default.experts and LlamaConfig.from_hf(config.to_hf()) == config, field
    assert LlamaConfig.from_hf(raw | {"output_router_logits": True}) == default


@pytest.mark.nightly
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("kind", [kind for kind in ROUTED if kind != "mixtral"])
def test_weights_of_experts_that_add_up_to_one_or_not(kind, tmp_path):
    """The other value than in `FIELDS`, of two experts a token."""
    value = not FIELDS[kind].get("norm_topk_prob", False)
    fields = {**FIELDS[kind], "num_hidden_layers": 1, "eos_token_id": ENDS}
    fields |= {"norm_topk_prob": value, "num_experts_per_tok": 2}
    theirs, ours = make(kind, tmp_path, **fields), load_model(tmp_path)
    tokens = tokens_of(ours, 2, 9)
    assert relative(jax.jit(ours.apply)(ours.params, None, tokens), torch_logits(theirs, tokens)) < TOLERANCE


def test_a_family_that_there_is_not():
    with pytest.raises(sx.SboraxError, match="model_type 'gemma9' is not supported"):
        LlamaConfig(**TINY, head_dim=8, model_type="gemma9")


def test_longrope_ends_with_the_pretraining():
    """Longer texts have other frequencies, from the first token on."""
    phi = LlamaConfig.from_hf(PUBLISHED["Phi-4-mini"])
    assert (phi.context, phi.windows, phi.rope.features(phi.head_dim)) == (4096, (), 96)
    assert math.isclose(phi.rope_magnitude, math.sqrt(1 + math.log(32) / math.log(4096)))
    scaling = PUBLISHED["Phi-4-mini"]["rope_scaling"]
    for fields in ({"factor": 32.0}, {"attention_factor": phi.rope_magnitude}):
        config = LlamaConfig.from_hf(PUBLISHED["Phi-4-mini"] | {"rope_scaling": scaling | fields})
        assert config.rope_magnitude == phi.rope_magnitude and LlamaConfig.from_hf(config.to_hf()) == config


def test_gemma3_files_of_either_form_say_the_same():
    old = LlamaConfig.from_hf(PUBLISHED["Gemma-3-1B"])
    assert old.layer_types == (("sliding_attention",) * 5 + ("full_attention",)) * 4 + ("sliding_attention",) * 2
    assert (old.rope.theta, old.rope_local_base_freq, old.windows[:6]) == (1e6, 1e4, (512,) * 5 + (8192,))
    bare = {key: value for key, value in PUBLISHED["Gemma-3-1B"].items() if not key.startswith(("rope", "sliding_w"))}
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}}
    assert LlamaConfig.from_hf(bare | {"sliding_window": 512, "rope_parameters": nested}) == old
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    full = LlamaConfig.from_hf(PUBLISHED["Gemma-3-1B"] | scaled)
    assert (full.rope.kind, full.rope.factor, full.local_rope.kind) == ("linear", 8.0, "default")
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(full.to_hf()))).rope_parameters
    assert theirs["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert theirs["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.nightly
def test_the_text_part_of_a_gemma_3_with_images(tmp_path):
    """The lines of docs/models.md."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=TINY | {"head_dim": 8, "layer_types": None, "num_hidden_layers": 2},
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    composite = transformers.Gemma3ForConditionalGeneration(config).eval()
    composite.save_pretrained(tmp_path / "both")
    with pytest.raises(sx.SboraxError, match="save its text part as gemma3_text"):
        load_model(tmp_path / "both")
    composite = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "both")
    text = transformers.Gemma3ForCausalLM(composite.config.text_config)
    text.model, text.lm_head = composite.model.language_model, composite.lm_head
    text.save_pretrained(tmp_path / "text")
    ours = load_model(tmp_path / "text")
    tokens = tokens_of(ours, 2, 9)
    assert relative(jax.jit(ours.apply)(ours.params, None, tokens), torch_logits(composite, tokens)) < TOLERANCE


def test_a_window_is_a_limit():
    windowed = LlamaConfig(**TINY, head_dim=8, model_type="mistral", sliding_window=WINDOW)
    model = LanguageModel(Llama(windowed), {}, windowed, None)
    with pytest.raises(sx.SboraxError, match=f"49 tokens is longer than the context of {WINDOW}"):
        jax.eval_shape(lambda params: model.apply(params, None, jnp.zeros((1, 49), jnp.int32)), abstract(windowed))


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.gguf and kind != "llama"])
def test_gguf_equals_the_directory(kind, tmp_path):
    """llama.cpp turns halves of a head together here, as Hugging Face does."""
    reference = make(kind, tmp_path, num_hidden_layers=2, **({"head_dim": 12} if kind == "qwen3" else {}))
    write_gguf(tmp_path / "tiny.gguf", reference)
    model, expected = load_model(tmp_path / "tiny.gguf"), load_model(tmp_path)
    chex.assert_trees_all_equal(model.params, expected.params)
    assert dataclasses.replace(model.config, bos_token_id=None) == expected.config
    # NFC makes one letter of a letter and its accent; digits stand alone.
    assert model.tokenizer.backend_tokenizer.normalizer.normalize_str("e\u0301") == "\u00e9"
    pieces = model.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 12")
    assert [piece for piece, _ in pieces] == ["ab", "Ġ", "1", "2"]


def test_gguf_of_another_architecture_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make("gemma", tmp_path, head_dim=12))
    with pytest.raises(sx.SboraxError, match="architecture 'gemma' is not supported; known: llama, qwen2, qwen3"):
        load_model(tmp_path / "tiny.gguf")


def test_lora_and_norms_go_to_peft(tmp_path):
    """Qwen3's norms of heads, trained beside an adapter, travel as modules_to_save, there and back."""
    base = tmp_path / "base"
    qwen = Pair(make("qwen3", base, num_hidden_layers=2, head_dim=12), load_model(base), base)
    params, adapters = sx.attach(jax.random.key(0), qwen.ours.params, ALL)
    paths = selected(list(flatten(params)), False, ("norm",))
    assert {"layers/self_attn/q_norm/scale", "layers/self_attn/k_norm/scale", "norm/scale"} < set(paths)
    scale = params["layers"]["self_attn"]["q_norm"]["scale"]
    attention = {**params["layers"]["self_attn"], "q_norm": {"scale": scale + jnp.linspace(0, 0.5, 12)[None]}}
    params = {**params, "layers": {**params["layers"], "self_attn": attention}}
    save_peft(tmp_path / "peft", qwen.ours, params, shaken(adapters))
    theirs = reloaded(qwen, tmp_path / "peft")
    ours = jax.jit(qwen.ours.apply)(*load_peft(tmp_path / "peft", qwen.ours), TOKENS)
    assert relative(ours, pair_logits(theirs)) < TOLERANCE
    assert relative(ours, pair_logits(qwen.torch)) > 1e-2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_data(tmp_path_factory.mktemp("data") / "data.jsonl"))


@pytest.mark.nightly
def test_a_step_in_four_bits_with_norms(tmp_path):
    """Qwen3: LoRA on 4 bits beside its norms; each gets a gradient and moves."""
    place = write_model(tmp_path, model_type="qwen3", hidden_size=64, intermediate_size=128, head_dim=32)
    model = load_model(place, quant="nf4")
    params, adapters = sx.attach(jax.random.key(0), model.params, ALL)
    parts = take_apart(params, adapters, False, ("norm",))
    assert all(isinstance(leaf, NF4Array) for path, leaf in parts.base.items() if path.endswith("_proj/kernel"))
    tx = optax.sgd(1e-2)
    row = {"tokens": jnp.arange(16)[None, None], "targets": jnp.arange(1, 17)[None, None]}
    ones = {"counts": jnp.ones((1, 1, 16), bool), "segments": jnp.ones((1, 1, 16), jnp.int32)}
    initial = start(parts, tx)
    final, numbers = make_step(model, tx, jax.random.key(0))(initial, parts.frozen, parts.base, row | ones)
    assert len(numbers["grad_norms"]) == 7 + 5
    assert all(norm > 0 for norm in numbers["grad_norms"].values())
    assert all((final.train["base"][path] != leaf).any() for path, leaf in parts.trained_base.items())


TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MARKS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]


def gemma_like():
    """A token a byte, a mark at the beginning of every text, and turns that end in a mark of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*MARKS, *alphabet])}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(MARKS)
    bare.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=TURNS
    )


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A tiny Gemma whose turns end in a token that `generation_config.json` alone names."""
    place = tmp_path_factory.mktemp("gemma")
    shape = TINY | {"vocab_size": 261, "num_hidden_layers": 2, "head_dim": 8, "tie_word_embeddings": True}
    config = LlamaConfig(**shape, model_type="gemma", bos_token_id=2, eos_token_id=(1,), pad_token_id=0)
    params = jax.jit(Llama(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    save_hf(place, LanguageModel(Llama(config), params, config, gemma_like()), params)
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    return place


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_every_text_begins_with_one_mark_if_the_family_has_one(gemma, data, template, tmp_path):
    words = load_model(gemma).tokenizer
    samples, _ = load_samples(sx.Data(data, template=template, max_length=512), words, words.eos_token_id, 512)
    for sample in samples:
        tokens = sample.tokens.tolist()
        assert tokens[0] == 2 and tokens.count(2) == 1
        # The end of a text is the end of a turn in a chat.
        assert tokens[sample.counts.nonzero()[0][-1]] == (4 if template == "chat" else 1)
    bare = load_model(write_model(tmp_path / "qwen", model_type="qwen2")).tokenizer
    bare.bos_token = None
    samples, _ = load_samples(sx.Data(data, template="alpaca", max_length=512), bare, 1, 512)
    assert all(bare.decode(sample.tokens[:5].tolist()) == "Below" for sample in samples)


def test_a_template_without_a_system_role_says_so(gemma):
    words = load_model(gemma).tokenizer
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    with pytest.raises(sx.SboraxError, match="System role not supported.*first user turn") as caught:
        prompt_of("chat", {"messages": turns}, words)
    assert "\n" not in str(caught.value)


def test_generate_ends_where_a_turn_ends(gemma, capsys):
    assert load_config(gemma).eos_token_id == (1, 4)
    assert main(["generate", str(gemma), "--template", "chat", "--prompt", "Hi", "--max-new-tokens", "4"]) == 0
    assert "<start_of_turn>" not in capsys.readouterr().out
    model = load_model(gemma)
    # A table in which the end of a turn follows from whatever was read.
    table = np.zeros((261, 32), np.float32)
    table[:, 0], table[4, 0] = 1, 2
    params = {**model.params, "embed_tokens": {"embedding": jnp.asarray(table)}}
    assert generate(model, params, None, [[2, 3, 70], [2, 71]], 4) == [[4], [4]]
    assert math.isclose(model.config.embedding_scale or 0, 32**0.5)
