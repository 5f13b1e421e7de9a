"""The decoder against transformers' torch models, and against itself in its other forms."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from sborax_models import TINY, make, relative, tokens_of, torch_logits, unrolled

import sborax as sx
from sborax.adapters.core import Adapter
from sborax.models import LanguageModel, Llama, LlamaConfig, Rope, abstract, load_model
from sborax.models.attention import attention

pytestmark = pytest.mark.usefixtures("strict")
TOLERANCE = 1e-5
"""Of the largest logit, in float32."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1_000.0, "factor": 2.5}
CONFIGS = {
    "mha-untied": ("llama", {"num_key_value_heads": 4}, "5GB"),
    "gqa-tied-llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "head_dim": 12}, "5GB"),
    "linear-biases": ("llama", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}, "5GB"),
    "shards": ("llama", {}, "8KB"),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}, "5GB"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, tmp_path):
    kind, fields, shard = CONFIGS[name]
    reference = make(kind, tmp_path, shard, **fields)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (name == "shards")
    model = load_model(tmp_path)
    tokens = tokens_of(model, 2, 48)
    assert relative(jax.jit(model.apply)(model.params, None, tokens), torch_logits(reference, tokens)) < TOLERANCE


def test_logits_equal_transformers_with_a_tokenizer(llama):
    model = load_model(llama)
    reference = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokens = jnp.array([model.tokenizer("Once upon a time, there was a little girl named Lily.")["input_ids"]])
    assert relative(jax.jit(model.apply)(model.params, None, tokens), torch_logits(reference, tokens)) < TOLERANCE


@pytest.mark.nightly
def test_logits_equal_transformers_on_smollm2(smollm2):
    model = load_model(smollm2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    chat = [{"role": "user", "content": "What is the capital of France, and how much is 12 + 345?"}]
    text = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    ids = model.tokenizer(text)["input_ids"]
    pieces = model.tokenizer.convert_ids_to_tokens(ids)
    assert [piece for piece in pieces if piece.isdigit()] == list("12345")
    assert pieces[0] == "<|im_start|>" and model.tokenizer.decode(ids) == text
    tokens = jnp.array([ids])
    assert relative(jax.jit(model.apply)(model.params, None, tokens), torch_logits(reference, tokens)) < TOLERANCE


@pytest.mark.parametrize("rope", [Rope(1e4), Rope(1e6, "linear", 4.0), Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192)])
def test_frequencies_equal_transformers(rope):
    config = LlamaConfig(**TINY, head_dim=64, rope=rope)
    theirs = transformers.LlamaConfig(**config.to_hf())
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    np.testing.assert_allclose(rope.inverse_frequencies(64), module.inv_freq.numpy(), rtol=2e-7, atol=0)


def random_model(**fields) -> LanguageModel:
    config = LlamaConfig(**(TINY | {"head_dim": 8} | fields))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.2, leaf.dtype), abstract(config))
    return LanguageModel(Llama(config), params, config, None)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_model()


@pytest.fixture(scope="module")
def adapted(model):
    """Params, and adapters with random leaves on an attention and an MLP projection and the head."""
    rules = [(r"q_proj|down_proj|lm_head", sx.LoRA(rank=2, alpha=4.0, dropout=0.5))]
    params, adapters = sx.attach(jax.random.key(1), model.params, rules)
    train, frozen = sx.split(adapters)
    rng = np.random.default_rng(1)
    train = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, leaf.dtype), train)
    return params, sx.combine(train, frozen)


@pytest.fixture(scope="module")
def logits(model):
    """The model's logits, compiled once for each kind of input."""
    return jax.jit(
        lambda params, adapters, tokens, segment_ids=None, dropout_key=None: model.apply(
            params, adapters, tokens, segment_ids=segment_ids, dropout_key=dropout_key
        )
    )


@pytest.fixture(scope="module")
def tokens(model):
    return tokens_of(model, 3, 12)


def test_adapted_equals_merged_and_hidden_feeds_the_head(model, adapted, logits, tokens):
    params, adapters = adapted
    ours, base = logits(params, adapters, tokens), logits(params, None, tokens)
    assert relative(ours, base) > 1e-2
    assert relative(logits(jax.jit(sx.merge)(params, adapters), None, tokens), ours) < TOLERANCE

    @jax.jit
    def parts(params, adapters, tokens):
        hidden = model.hidden(params, adapters, tokens)
        return model.head(params, adapters, hidden), hidden @ params["lm_head"]["kernel"]

    assert relative(parts(params, adapters, tokens)[0], ours) < 1e-6
    assert relative(parts(params, {"layers": adapters["layers"]}, tokens)[1], ours) > 1e-2
    assert relative(parts(params, None, tokens)[1], base) < 1e-6


def test_dropout_needs_a_key_and_differs_by_key(adapted, logits, tokens):
    first, repeat, second = (logits(*adapted, tokens, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, repeat)
    assert relative(first, logits(*adapted, tokens)) > 1e-3
    assert relative(first, second) > 1e-3


def test_scanned_equals_unrolled(model, adapted, logits, tokens):
    loop = dataclasses.replace(model, module=Llama(model.config, scan=False))
    flat, flat_adapters = (unrolled(model, tree) for tree in adapted)
    chex.assert_trees_all_equal_shapes_and_dtypes(flat, loop.abstract())
    assert relative(jax.jit(loop.apply)(flat, flat_adapters, tokens), logits(*adapted, tokens)) < TOLERANCE


def test_remat_changes_nothing(model, adapted, tokens):
    params, adapters = adapted
    train, frozen = sx.split(adapters)

    def gradient(remat):
        variant = dataclasses.replace(model, module=Llama(model.config, remat=remat))

        def loss(train):
            return jnp.mean(jnp.square(variant.apply(params, sx.combine(train, frozen), tokens)))

        traced = jax.jit(jax.grad(loss)).trace(train)
        return str(traced.jaxpr), jax.tree.leaves(traced.lower().compile()(train))

    text, plain = gradient("none")
    assert "remat" not in text
    for remat in ("full", "qkv,adapter_h", "qkv,offload:gate_up"):
        text, leaves = gradient(remat)
        assert "remat" in text
        assert ("<host>" in text) == ("offload" in remat)
        for got, want in zip(leaves, plain, strict=True):
            assert relative(got, want) < TOLERANCE


def test_padding_and_packing_change_nothing(model, logits, tokens):
    """The same 5 and 7 tokens alone, padded on either side, and packed into one row."""
    short, long = np.asarray(tokens)[0, :5], np.asarray(tokens)[1, :7]
    rows = np.array([[*long, *short], [*short, *long], [9, 9, 9, *short, 8, 8, 8, 8]], np.int32)
    segments = np.array([[1] * 7 + [2] * 5, [1] * 5 + [0] * 7, [0] * 3 + [1] * 5 + [0] * 4], np.int32)
    out = np.asarray(logits(model.params, None, jnp.asarray(rows), jnp.asarray(segments)))
    alone = jax.jit(lambda part: model.apply(model.params, None, part))
    want_short, want_long = (np.asarray(alone(jnp.asarray(part)[None]))[0] for part in (short, long))
    assert relative(out[0, :7], want_long) < 1e-6
    for got in (out[0, 7:], out[1, :5], out[2, 3:8]):
        assert relative(got, want_short) < 1e-6
    assert np.isfinite(out).all()


def test_attention_equals_the_formula():
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((2, size, heads, 4)).astype(np.float32) for size, heads in ((3, 6), (5, 2), (5, 2))
    )
    segments = np.array([[1, 1, 1, 1, 2], [0, 0, 1, 1, 1]])
    inputs = (jnp.asarray(part) for part in (query, key, value, segments[:, 2:], segments))
    out = np.asarray(jax.jit(attention)(*inputs))
    want = np.zeros_like(query)
    for batch, place, head in np.ndindex(2, 3, 6):
        slots = [k for k in range(place + 3) if segments[batch, k] == segments[batch, place + 2]]
        scores = key[batch, slots, head // 3] @ query[batch, place, head] / 2
        weights = np.exp(scores - scores.max())
        want[batch, place, head] = weights / weights.sum() @ value[batch, slots, head // 3]
    np.testing.assert_allclose(out, want, atol=1e-6)


def test_bfloat16_stays_bfloat16_until_the_logits(model, logits, tokens):
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    low = dataclasses.replace(model, module=Llama(model.config, jnp.dtype(jnp.bfloat16)))
    hidden, out = jax.jit(lambda params: (low.hidden(params, None, tokens), low.apply(params, None, tokens)))(narrow)
    assert hidden.dtype == jnp.bfloat16 and out.dtype == jnp.float32
    assert 0 < relative(out, logits(model.params, None, tokens)) < 0.1


def test_an_adapter_the_model_never_reads_is_an_error(model, adapted, tokens):
    params, adapters = adapted
    stray = adapters["lm_head"]["kernel"]
    assert isinstance(stray, Adapter)
    with pytest.raises(sx.SboraxError, match="layers/self_attn/qproj/kernel"):
        model.apply(params, {"layers": {"self_attn": {"qproj": {"kernel": stray}}}}, tokens)
    with pytest.raises(sx.SboraxError, match="embed_tokens/lookup"):
        model.apply(params, {"embed_tokens": {"lookup": stray}}, tokens)


def test_the_context_is_a_limit(model):
    with pytest.raises(sx.SboraxError, match="longer than the context of 64"):
        model.apply(model.params, None, jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(sx.SboraxError, match="context of 8"):
        windowed = random_model(sliding_window=8)
        windowed.apply(windowed.params, None, jnp.zeros((1, 9), jnp.int32))
