"""The Flax Linen layers that every model here is made of."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sborax import core
from sborax.procedures.prilora import input_norms


class Linear(nn.Module):
    """A projection whose kernel may be adapted, quantised or both.

    The kernel lives in collection `params`; its adapter, if any, at the same path in collection `adapters`. Norms of
    the input features go to collection `observations` in a call that makes it mutable.
    """

    features: int
    use_bias: bool = False
    dtype: Any = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"], ctx: core.Context = core.Context()) -> Float[Array, "*batch out"]:
        """The adapted projection of `x`, with dropout if the call carries an rng named `dropout`."""
        # `Module.param` compares leaf shapes with the initialiser's, which a packed kernel does not have.
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
        if self.has_rng("dropout"):
            ctx = core.Context(self.make_rng("dropout"), ctx.rows, ctx.tokens)
        if self.is_mutable_collection("observations") and not self.is_initializing():
            self.put_variable("observations", "kernel", input_norms(x, ctx.tokens.get("mask")))
        y = core.linear(x, kernel, self.get_variable("adapters", "kernel"), ctx)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
        return y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, the mean in float32. [arXiv:1910.07467]"""

    eps: float
    dtype: Any = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """`x` normalised over its last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return jnp.broadcast_to(scale.astype(x.dtype), x.shape) * normed.astype(x.dtype)


class Embed(nn.Module):
    """A table of token vectors."""

    count: int
    features: int
    dtype: Any = jnp.dtype(jnp.float32)

    def setup(self) -> None:
        """The table, also read by a tied head."""
        shape = (self.count, self.features)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape, self.dtype)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        """The vectors of `tokens`."""
        return jnp.take(self.embedding, tokens, axis=0)


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary embedding: features (i, i + head_dim / 2) turn together, as Hugging Face's weights expect."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
