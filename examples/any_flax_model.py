"""sborax on any Flax model, Linen or NNX.

    python examples/any_flax_model.py

`sx.apply_linen` and `sx.adapt_nnx` put adapters at the projections of a model that knows nothing of them, and form no
merged weights. `sx.merge(params, adapters)` in the loss computes the same for any function of parameters.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import sborax as sx

FEATURES, HEADS, CLASSES = 32, 4, 3

RULES = [
    # Flax's attention has an axis for heads: kernels are (in, heads, head_dim) and (heads, head_dim, out).
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


def batch(key: jax.Array, rows: int = 64) -> tuple[jax.Array, jax.Array]:
    """Sequences, whose class is the largest of their first features summed over the sequence."""
    x = jax.random.normal(key, (rows, 6, FEATURES))
    return x, x[:, :, :CLASSES].sum(axis=1).argmax(axis=1)


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The mean over rows, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def fine_tune_linen(steps: int = 60) -> tuple[list[float], jax.Array, jax.Array]:
    """Returns the losses, and the logits of the adapted and of the merged model, which are equal."""
    module = LinenClassifier()
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 6, FEATURES)))["params"]
    params, adapters = sx.attach(jax.random.key(1), params, RULES)
    train, frozen = sx.split(adapters)
    optimizer = optax.adam(1e-2)

    def apply(train: Any, x: jax.Array) -> jax.Array:
        return sx.apply_linen(module, {"params": params}, sx.combine(train, frozen), x)

    @jax.jit
    def step(train: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        x, label = batch(key)
        loss, grads = jax.value_and_grad(lambda train: cross_entropy(apply(train, x), label))(train)
        updates, state = optimizer.update(grads, state, train)
        return optax.apply_updates(train, updates), state, loss

    state, losses = optimizer.init(train), []
    for key in jax.random.split(jax.random.key(2), steps):
        train, state, loss = step(train, state, key)
        losses.append(float(loss))
    x, _ = batch(jax.random.key(3))
    return losses, apply(train, x), module.apply({"params": sx.merge(params, sx.combine(train, frozen))}, x)


def fine_tune_nnx(steps: int = 60) -> tuple[list[float], jax.Array, jax.Array]:
    """Returns the losses, and the logits of the adapted and of the merged model, which are equal."""
    plain = NNXClassifier(nnx.Rngs(0))
    graph, state, constants = nnx.split(plain, nnx.Param, ...)
    params, adapters = sx.attach(jax.random.key(1), nnx.to_pure_dict(state), RULES)
    model = sx.adapt_nnx(plain, adapters)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=sx.Trained)

    def loss_of(model: Any, x: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(model(x), label)

    @nnx.jit
    def step(model: Any, optimizer: Any, key: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, sx.Trained))(model, *batch(key))
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, key)) for key in jax.random.split(jax.random.key(2), steps)]
    x, _ = batch(jax.random.key(3))
    nnx.replace_by_pure_dict(state, sx.merge(params, sx.adapters_nnx(model)))
    return losses, model(x), nnx.merge(graph, state, constants)(x)


def main() -> None:
    for name, fine_tune in (("Linen", fine_tune_linen), ("NNX", fine_tune_nnx)):
        losses, adapted, merged = fine_tune()
        difference = float(jnp.abs(adapted - merged).max())
        print(f"{name}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, adapted and merged differ by {difference:.1e}")


if __name__ == "__main__":
    main()
