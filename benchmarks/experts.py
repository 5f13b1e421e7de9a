"""A step with adapters on the experts of a mixture, beside one on dense layers that multiply each token as often."""

from typing import Any

import jax
import jax.numpy as jnp

import sborax as sx
from benchmarks.ours import METHODS
from benchmarks.runner import Runner, in_turn, time_ratio
from sborax.models import LlamaConfig
from sborax.models.config import Experts
from sborax.models.language_model import LanguageModel, decoder_of

HIDDEN, LAYERS, HEADS, VOCABULARY = 1024, 2, 16, 512
COUNT, CHOSEN, WIDTH = 16, 4, 512
"""Experts of a layer, those that a token passes, and the inner width of each."""
ROWS, LENGTH, RANK = 4, 512, 8


def config(experts: Experts | None, width: int) -> LlamaConfig:
    """Two layers, dense or sparse."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        model_type="llama" if experts is None else "mixtral",
        experts=experts,
    )


def runner(shape: LlamaConfig, method: Any, tokens: jax.Array) -> tuple[Runner, int]:
    """The compiled step of gradient descent with adapters on all MLPs, and the number of trained parameters.

    The loss is a mean of squares of the hidden states, since both models would have the same head.
    """
    module = decoder_of(shape, remat="cheap")
    params = jax.jit(module.init)(jax.random.key(0), tokens[:1, :8])["params"]
    params, adapters = sx.attach(jax.random.key(1), params, [("mlp", method)])
    model, (train, frozen) = LanguageModel(module, params, shape, None), sx.split(adapters)

    @jax.jit
    def step(train: Any, frozen: Any, params: Any, tokens: jax.Array) -> tuple[Any, dict[str, Any]]:
        def loss(train: Any) -> jax.Array:
            return jnp.mean(jnp.square(model.hidden(params, sx.combine(train, frozen), tokens)))

        value, slopes = jax.value_and_grad(loss)(train)
        return jax.tree.map(lambda leaf, slope: leaf - 0.01 * slope, train, slopes), {"loss": value}

    return Runner.of(step, train, frozen, params, tokens), sx.count(adapters)


def measure(method: str, steps: int) -> dict[str, Any]:
    """Time and temporaries of the step with experts, over those of the dense one."""
    tokens = jax.random.randint(jax.random.key(2), (ROWS, LENGTH), 0, VOCABULARY)
    adapter = METHODS[method](RANK)
    sparse, trained = runner(config(Experts(COUNT, CHOSEN, WIDTH, normalised=True), WIDTH), adapter, tokens)
    dense, dense_trained = runner(config(None, CHOSEN * WIDTH), adapter, tokens)
    return {
        "time": time_ratio(*in_turn(sparse, dense, steps)),
        "temporaries": sparse.temporaries / dense.temporaries,
        "trained": trained,
        "dense_trained": dense_trained,
    }
