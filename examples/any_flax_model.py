"""sborax on models that are not its own: any Flax parameter tree, Linen or NNX.

    python examples/any_flax_model.py

`sx.merge(params, adapters)` is a pure, differentiable function from parameters to parameters, so a model that knows
nothing of adapters is fine-tuned by calling it on the merged ones inside the loss. It forms every adapted weight in
each step: slower than the `linear` that sborax's own models call, but it asks nothing of the model.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sborax as sx

FEATURES, HEADS, CLASSES = 32, 4, 3

RULES = [
    # Flax's attention keeps its heads apart: kernels are (in, heads, head_dim) and (heads, head_dim, out).
    sx.Rule("attention/(query|value)", sx.SBoRA(rank=8), in_axes=1),
    sx.Rule("attention/out", sx.DoRA(rank=4), in_axes=2),
    ("hidden", sx.Bone(rank=8)),
]


class LinenClassifier(nn.Module):
    """Self-attention, a hidden layer, a mean over the sequence."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, name="attention")(x)
        x = nn.gelu(nn.Dense(64, name="hidden")(x))
        return nn.Dense(CLASSES, name="head")(x.mean(axis=1))


class NNXClassifier(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
        self.hidden = nnx.Linear(FEATURES, 64, rngs=rngs)
        self.head = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x)
        x = nnx.gelu(self.hidden(x))
        return self.head(x.mean(axis=1))


def linen_model() -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """`(apply, params)` of the Linen model."""
    module = LinenClassifier()
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 6, FEATURES)))["params"]
    return lambda params, x: module.apply({"params": params}, x), params


def nnx_model() -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """`(apply, params)` of the NNX model: its parameters as a plain nested dict."""
    graph, state, rest = nnx.split(NNXClassifier(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled, rest)(x)

    return apply, nnx.to_pure_dict(state)


def batch(key: jax.Array, rows: int = 64) -> tuple[jax.Array, jax.Array]:
    """Sequences whose class is the largest of their first features, summed over the sequence."""
    x = jax.random.normal(key, (rows, 6, FEATURES))
    return x, x[:, :, :CLASSES].sum(axis=1).argmax(axis=1)


def fine_tune(apply: Callable[[Any, jax.Array], jax.Array], params: Any, steps: int = 60) -> tuple[Any, list[float]]:
    """Train adapters alone; the dense parameters that come of it, and the loss of every step."""
    params, adapters = sx.attach(jax.random.key(1), params, RULES)
    train, frozen = sx.split(adapters)
    optimizer = optax.adam(1e-2)

    def loss_of(train: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        merged = sx.merge(params, sx.combine(train, frozen))
        return optax.softmax_cross_entropy_with_integer_labels(apply(merged, x), label).mean()

    @jax.jit
    def step(train: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of)(train, *batch(key))
        updates, state = optimizer.update(grads, state, train)
        return optax.apply_updates(train, updates), state, loss

    state, losses = optimizer.init(train), []
    for key in jax.random.split(jax.random.key(2), steps):
        train, state, loss = step(train, state, key)
        losses.append(float(loss))
    return sx.merge(params, sx.combine(train, frozen)), losses


def main() -> None:
    for name, model in (("Linen", linen_model), ("NNX", nnx_model)):
        _, losses = fine_tune(*model())
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
