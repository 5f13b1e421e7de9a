"""Another decoder than LLaMA in every place where the package runs one."""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import write_data, write_model

import sborax as sx
from sborax.adapters.core import Context
from sborax.evaluate.likelihood import score_options, score_rows
from sborax.layout.state import start, take_apart
from sborax.models import LanguageModel, abstract, load_config
from sborax.models.attention import visible
from sborax.models.beam import beam_search
from sborax.models.decoder import AbstractDecoder
from sborax.models.families import Family
from sborax.models.layers import Embed, Linear, RMSNorm
from sborax.plans.ahead import outline

pytestmark = pytest.mark.usefixtures("strict")


class Mean(nn.Module):
    """x + the mean of the values of all visible tokens."""

    dtype: Any

    @nn.compact
    def __call__(self, x, segments, past, ctx):
        values = Linear(x.shape[-1], dtype=self.dtype, name="v_proj")(x, ctx)
        earlier = values if past is None else jnp.concatenate([past[:, :, 0], values], axis=1)
        mask = visible(x.shape[1], earlier.shape[1], *segments).astype(self.dtype)
        weights = mask / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
        weights = jnp.broadcast_to(weights, (x.shape[0], *weights.shape[1:]))
        return x + weights @ earlier, values[:, :, None]


class Layer(nn.Module):
    """A single layer, so that the path of its projection is LLaMA's."""

    dtype: Any

    @nn.compact
    def __call__(self, *inputs):
        return Mean(self.dtype, name="self_attn")(*inputs)


class Layers(nn.Module):
    """Layers "0", "1", ..."""

    count: int
    dtype: Any

    @nn.compact
    def __call__(self, x, segments, past, ctx):
        caches = []
        for number in range(self.count):
            earlier = None if past is None else past[number]
            x, values = Layer(self.dtype, name=str(number))(x, segments, earlier, ctx)
            caches.append(values)
        return x, jnp.stack(caches)


class Averaging(AbstractDecoder):
    """A decoder without attention, positions and a gated unit, whose logits are capped."""

    def setup(self):
        self.embed_tokens = Embed(self.config.vocab_size, self.config.hidden_size, self.dtype)
        self.layers = Layers(self.config.num_hidden_layers, self.dtype)
        self.norm = RMSNorm(1e-5, self.dtype)

    def hidden(self, tokens, segment_ids=None, positions=None, ctx=Context(), past=None):
        cache, segments = None, (segment_ids, segment_ids)
        if past is not None:
            cache, earlier = past
            queries = jnp.ones(tokens.shape, earlier.dtype) if segment_ids is None else segment_ids
            segments = queries, jnp.concatenate([earlier, queries], axis=1)
        x, values = self.layers(self.embed_tokens(tokens), segments, cache, ctx)
        return self.norm(x), values if self.keep else None

    def head(self, hidden, ctx=Context()):
        return 6 * jnp.tanh((hidden @ self.embed_tokens.embedding.T).astype(jnp.float32) / 6)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A config that is not LLaMA's."""

    model_type: str = "averaging"
    vocab_size: int = 32
    hidden_size: int = 16
    intermediate_size: int = 16
    num_hidden_layers: int = 2
    num_attention_heads: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 16
    context: int = 64
    eos_token_id: tuple[int, ...] = ()
    tie_word_embeddings: bool = True
    decoder: type[AbstractDecoder] = Averaging

    def to_hf(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class AveragingFamily(Family):
    """The decoder under a `model_type`, with the config of LLaMA."""

    model_type: ClassVar[str] = "averaging"
    causal_lm: str = "AveragingForCausalLM"
    optional: frozenset[str] = frozenset({"attention_bias", "mlp_bias"})
    decoder: type[AbstractDecoder] | None = Averaging


RULES = [("v_proj", sx.LoRA(rank=2))]
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    rng, config = np.random.default_rng(0), Sizes()
    shapes = abstract(config)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    return LanguageModel(Averaging(config), params, config, None)


@pytest.fixture(scope="module")
def adapters(model):
    """Adapters that have moved from their start."""
    train, frozen = sx.split(sx.attach(jax.random.key(0), model.params, RULES)[1])
    rng = np.random.default_rng(1)
    train = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), train)
    return sx.combine(train, frozen)


def greedy(model, params, adapters, prompt, new):
    """Greedy text without a cache."""
    text = list(prompt)
    for _ in range(new):
        text.append(int(jnp.argmax(model.apply(params, adapters, jnp.array([text]))[0, -1])))
    return text[len(prompt) :]


def test_adapters_reach_the_projections(model, adapters):
    tokens = jnp.array([PROMPTS[0]])
    base, adapted = (model.apply(model.params, tree, tokens) for tree in (None, adapters))
    merged = model.apply(sx.merge(model.params, adapters), None, tokens)
    np.testing.assert_allclose(adapted, merged, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(adapted - base)).max() > 0.1
    _, collected = model.collect(model.params, adapters, tokens, ["inputs"])
    assert collected.inputs.keys() == {f"layers/{layer}/self_attn/v_proj/kernel" for layer in range(2)}
    stray = {"layers": {"0": {"self_attn": {"q_proj": adapters["layers"]["0"]["self_attn"]["v_proj"]}}}}
    with pytest.raises(sx.SboraxError, match="the model has no such projection"):
        model.apply(model.params, stray, tokens)


def test_text_over_the_cache(model, adapters):
    expected = [greedy(model, model.params, adapters, prompt, 6) for prompt in PROMPTS]
    assert sx.generate(model, model.params, adapters, PROMPTS, 6) == expected
    assert len(beam_search(model, model.params, adapters, PROMPTS, 6, 2)[0]) == 6


def test_continuations_are_scored(model, adapters):
    variables, prompt, targets = {"params": model.params, "adapters": adapters}, PROMPTS[0], [7, 8]
    logits = model.apply(model.params, adapters, jnp.array([[*prompt, *targets]]))
    log_probs = jax.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
    expected = float(log_probs[0, targets[0]] + log_probs[1, targets[1]])
    length, count = jnp.array([len(prompt)]), jnp.array([2])
    row = jnp.array([[*prompt, targets[0]]])
    by_itself, _ = score_rows(model.module, variables, row, length, jnp.array([targets]), count)
    np.testing.assert_allclose(by_itself, [expected], rtol=1e-4)
    of_one, _ = score_options(model.module, variables, jnp.array([prompt]), length, jnp.array([[targets]]), count[None])
    np.testing.assert_allclose(of_one, [[expected]], rtol=1e-4)


def test_a_step_lowers_the_loss(model):
    tokens = jax.random.randint(jax.random.key(2), (1, 4, 9), 1, 32, jnp.int32)
    ones = jnp.ones((1, 4, 8), jnp.int32)
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "counts": ones > 0, "segments": ones}
    parts = take_apart(*sx.attach(jax.random.key(3), model.params, RULES))
    tx = optax.adam(1e-2)
    step, state, losses = sx.make_step(model, tx, jax.random.key(4)), start(parts, tx), []
    for _ in range(8):
        state, numbers = step(state, parts.frozen, parts.base, batch)
        losses.append(float(numbers["loss"]))
    assert losses[-1] < losses[0] - 0.1
    # The loss is that of the decoder's head, which is more than a product.
    logits = model.apply(model.params, None, tokens[0, :, :-1])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[0, :, 1:]).mean()
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)


def test_a_family_names_its_decoder(tmp_path):
    """From a directory: a plan, a run of the same experiment, and its text."""
    place = write_model(tmp_path / "model", model_type="averaging")
    config = load_config(place)
    language_model = sx.load_model(place)
    assert isinstance(language_model.module, Averaging) and config.decoder is Averaging
    assert jax.tree.map(jnp.shape, language_model.params) == jax.tree.map(lambda leaf: leaf.shape, abstract(config))
    data = sx.Data(
        str(write_data(tmp_path / "data.jsonl")), template="{instruction} ", answer="{output}", max_length=64
    )
    experiment = sx.Experiment(str(place), data, RULES, steps=2, batch_size=2)
    planned = outline(experiment, config)
    assert isinstance(planned.model.module, Averaging)
    prepared = sx.prepare(experiment, language_model, 2)
    parts = prepared.adapt(language_model.params)
    shapes = jax.tree.map(jnp.shape, parts.train)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, planned.parts.train)
    batches, _ = sx.read_data(experiment, language_model, print)
    _, numbers = prepared.make_step()(prepared.start(parts), parts.frozen, parts.base, batches[0])
    assert np.isfinite(numbers["loss"])
    params, adapters = sx.attach(jax.random.key(0), language_model.params, RULES)
    assert sx.generate(language_model, params, adapters, PROMPTS, 4) == [
        greedy(language_model, params, adapters, prompt, 4) for prompt in PROMPTS
    ]
