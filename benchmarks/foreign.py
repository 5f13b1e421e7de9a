"""The step of adapters inside a model that is not ours, over the step that merges them in the loss.

`apply_linen` runs three `Dense(1024)` layers and NanoMoE of nano-moe-jax, `adapt_nnx` runs Mamba-2 of mamba2-jax. Both
steps are timed in turn in one process, from the same weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sborax as sx
from benchmarks.runner import Runner, in_turn, time_ratio

RANK, RATE = 8, 1e-3
Loss: TypeAlias = Callable[[Any, Any], jax.Array]
"""A function of the base's parameters and of adapters."""


class Pair(NamedTuple):
    """Two losses that are equal: with adapters inside the model, and of the merged model."""

    params: Any
    adapters: Any
    inside: Loss
    merged: Loss


class Dense(nn.Module):
    """Three layers with GELU."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number in range(3):
            x = nn.gelu(nn.Dense(1024, name=f"dense_{number}")(x))
        return x


def dense(rows: int = 16) -> Pair:
    """LoRA on the three layers."""
    x, target = jax.random.normal(jax.random.key(0), (2, rows, 1024))
    return _linen(Dense(), x, [("dense", sx.LoRA(RANK))], lambda out: jnp.mean((out - target) ** 2))


def nano_moe(rows: int = 1) -> Pair:
    """LoRA on attention and experts of NanoMoE with 4 blocks of 256 features; rows of 128 tokens."""
    from nano_moe import NanoMoE, NanoMoEConfig

    tokens = jax.random.randint(jax.random.key(0), (rows, 128), 0, 256)
    module = NanoMoE(NanoMoEConfig(d_model=256, d_ff=1024))
    rules = [("MultiHeadAttention|expert", sx.LoRA(RANK))]
    return _linen(module, tokens, rules, lambda out: _cross_entropy(out[0], tokens))


def mamba2(rows: int = 1) -> Pair:
    """LoRA on both projections of Mamba-2 with 4 layers of 512 features; rows of 128 tokens."""
    from mamba2_jax import Mamba2Config, Mamba2ForCausalLM

    tokens = jax.random.randint(jax.random.key(0), (rows, 128), 0, 256)
    config = Mamba2Config(vocab_size=256, hidden_size=512, state_size=64, chunk_size=64, num_hidden_layers=4)
    graph, state, constants = nnx.split(Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    params, adapters = sx.attach(jax.random.key(1), nnx.to_pure_dict(state), [("in_proj|out_proj", sx.LoRA(RANK))])

    def model(params: Any) -> Any:
        full = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(full, params)
        return nnx.merge(graph, full, constants)

    return Pair(
        params,
        adapters,
        lambda params, adapters: _cross_entropy(sx.adapt_nnx(model(params), adapters)(tokens)["logits"], tokens),
        lambda params, adapters: _cross_entropy(model(sx.merge(params, adapters))(tokens)["logits"], tokens),
    )


MODELS: dict[str, Callable[..., Pair]] = {"three Dense(1024)": dense, "NanoMoE": nano_moe, "Mamba-2": mamba2}
"""As `python -m benchmarks foreign` names them."""


def _linen(module: nn.Module, inputs: jax.Array, rules: list[Any], loss: Callable[[Any], jax.Array]) -> Pair:
    params = jax.jit(module.init)(jax.random.key(1), inputs)["params"]
    params, adapters = sx.attach(jax.random.key(2), params, rules)
    return Pair(
        params,
        adapters,
        lambda params, adapters: loss(sx.apply_linen(module, {"params": params}, adapters, inputs)),
        lambda params, adapters: loss(module.apply({"params": sx.merge(params, adapters)}, inputs)),
    )


def _cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def runners(pair: Pair) -> tuple[Runner, Runner]:
    """The compiled steps of gradient descent, with adapters inside and merged. No trained leaf starts at zero."""
    train, frozen = sx.split(pair.adapters)
    train = jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(jax.random.key(3), leaf.shape), train)

    def runner(loss: Loss) -> Runner:
        @jax.jit
        def step(train: Any, frozen: Any, params: Any) -> tuple[Any, dict[str, Any]]:
            value, slopes = jax.value_and_grad(lambda train: loss(params, sx.combine(train, frozen)))(train)
            train = jax.tree.map(lambda leaf, slope: leaf - RATE * slope, train, slopes)
            return train, {"loss": value, "slopes": slopes}

        return Runner.of(step, train, frozen, pair.params)

    return runner(pair.inside), runner(pair.merged)


def difference(inside: Runner, merged: Runner) -> float:
    """The largest difference of a gradient's entries, over the largest entry of that gradient."""
    slopes = (runner.compiled(runner.state, *runner.constants)[1]["slopes"] for runner in (inside, merged))
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), *slopes)))


def measure(model: str, steps: int) -> dict[str, float]:
    """Time and temporaries of the step with adapters inside, over those of the merged one, and how far they differ."""
    inside, merged = runners(MODELS[model]())
    apart = difference(inside, merged)
    return {
        "time": time_ratio(*in_turn(inside, merged, steps)),
        "temporaries": inside.temporaries / merged.temporaries,
        "temp_mib": inside.temporaries / 2**20,
        "merged_temp_mib": merged.temporaries / 2**20,
        "difference": apart,
    }
