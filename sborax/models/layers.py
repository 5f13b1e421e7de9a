"""The Flax Linen layers of the models."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sborax.adapters import core
from sborax.adapters.bank import joined
from sborax.adapters.depth import remember
from sborax.adapters.routing import GATE, ROUTER
from sborax.adapters.tables import look_up, tied_head
from sborax.models.sharding import sent_packed, used_whole

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""Activations of a gated unit by their names in transformers."""


class Linear(nn.Module):
    """A projection whose kernel may be adapted, quantised or both.

    The kernel is in collection `params`, its adapter, if any, at the same path in collection `adapters`. A call that
    makes collection `observations` mutable puts the norms of the input features there. A call that makes collection
    `rows` mutable puts the input itself there. Collection `memory` exists for adapters that ask for it, and holds what
    the same projection of the previous layer remembers: see `depth`.
    """

    features: int
    use_bias: bool = False
    dtype: Any = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in"], ctx: core.Context = core.Context()) -> Float[Array, "*batch out"]:
        """The adapted projection of `x`, with dropout if the call carries an rng named `dropout`."""
        # `Module.param` compares leaf shapes with the initialiser's, which a packed kernel does not have.
        if self.has_variable("params", "kernel"):
            kernel = sent_packed(self.get_variable("params", "kernel"), self.path[-1])
        else:
            shape = (x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
        if self.has_rng("dropout"):
            ctx = dataclasses.replace(ctx, key=self.make_rng("dropout"))
        ctx = ctx.at("/".join(self.path), GATE)
        if self.is_mutable_collection("observations") and not self.is_initializing():
            self.put_variable("observations", "kernel", feature_norms(x, ctx.mask))
        if self.is_mutable_collection("rows") and not self.is_initializing():
            self.put_variable("rows", "kernel", x)
        adapter, memory = adapter_of(self), self.get_variable("memory", "kernel")
        adapter = None if adapter is None else used_whole(adapter, self.path[-1])
        if adapter is not None and memory is not None:
            # A copy, since Flax merges a dict that is put into a collection into the one that was read from it.
            ctx = dataclasses.replace(ctx, memory=jax.tree.map(lambda leaf: leaf, memory))
            self._remember(x, adapter, ctx)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype) if self.use_bias else None
        return core.linear(x, kernel, adapter, ctx, bias)

    def _remember(self, x: Float[Array, "batch seq in"], adapter: core.Adapter, ctx: core.Context) -> None:
        """Put what the next layer reads into collection `memory`, and the norms into `remembered` if it is mutable."""
        memory = remember(x, adapter, ctx)
        self.put_variable("memory", "kernel", memory)
        if self.is_mutable_collection("remembered"):
            flat = jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:2], -1), memory)
            self.put_variable("remembered", "kernel", jax.tree.map(lambda leaf: feature_norms(leaf, ctx.mask), flat))


def adapter_of(layer: nn.Module, name: str = "kernel") -> core.Adapter | None:
    """The adapter of a parameter of `layer`, with what it reads of banks; None if there is none."""
    adapter = layer.get_variable("adapters", name)
    return None if adapter is None else joined(adapter, layer.get_variable("bank", name))


class GatedUnit(nn.Module):
    """down(f(gate(x)) * up(x)), f the activation."""

    width: int
    activation: Callable[[Array], Array]
    use_bias: bool = False
    dtype: Any = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d"], ctx: core.Context) -> Float[Array, "batch seq d"]:
        """The gated feed-forward unit."""
        gate, up = (
            checkpoint_name(Linear(self.width, self.use_bias, self.dtype, name=name)(x, ctx), "gate_up")
            for name in ("gate_proj", "up_proj")
        )
        return Linear(x.shape[-1], self.use_bias, self.dtype, name="down_proj")(self.activation(gate) * up, ctx)


def feature_norms(x: Float[Array, "*batch in"], mask: Array | None = None) -> Float[Array, " in"]:
    """||X_j|| over all tokens of a batch for each input feature j, float32, without a gradient.

    mask: (*batch), zero at padding.
    """
    # The gradient of a zero norm is NaN, even if nothing uses it.
    wide = jax.lax.stop_gradient(x).astype(jnp.float32).reshape(-1, x.shape[-1])
    if mask is not None:
        # Not a product: padding may hold values that are not finite.
        wide = jnp.where((mask != 0).reshape(-1, 1), wide, 0.0)
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=0))


def routed(layer: nn.Module, x: Float[Array, "batch seq d"], ctx: core.Context) -> core.Context:
    """`ctx` with the weights of the adapters that the router of `layer` weighs, if it has one.

    A call that makes collection `routing` mutable puts the weights there. A call that finds them there, such as that of
    a token over a cache of keys and values, uses these.

    - x: input of the layer.

    Raises SboraxError without a mask of the prompt.
    """
    node = layer.get_variable("adapters", ROUTER)
    if node is None:
        return ctx
    path = "/".join(layer.path)
    if layer.has_variable("routing", "gates"):
        gates = layer.get_variable("routing", "gates")
    else:
        if ctx.prompt is None:
            raise core.SboraxError(
                f"{path}/{ROUTER} decides by the prompt: say which tokens belong to it, "
                "ctx=Context(prompt=mask) with a (batch, seq) mask without padding and answer"
            )
        gates, loss = node.method.route(x, ctx.prompt.astype(bool), node)
        if layer.is_mutable_collection("routing"):
            layer.put_variable("routing", "gates", gates)
            layer.put_variable("routing", "loss", loss)
    rows = {f"{path}/{expert}": gates[:, i] for i, expert in enumerate(node.method.experts)}
    return dataclasses.replace(ctx, rows={**ctx.rows, **rows})


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, the mean in float32. [arXiv:1910.07467]

    centred: the factor is 1 + scale, and the product is float32, too.
    """

    eps: float
    dtype: Any = jnp.dtype(jnp.float32)
    centred: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """`x` normalised over its last axis."""
        start = nn.initializers.zeros if self.centred else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), self.dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.centred:
            return (jnp.broadcast_to(1 + scale.astype(jnp.float32), x.shape) * normed).astype(x.dtype)
        return jnp.broadcast_to(scale.astype(x.dtype), x.shape) * normed.astype(x.dtype)


class Embed(nn.Module):
    """A table of token vectors. Vectors that are looked up are multiplied by `factor`, if there is one."""

    count: int
    features: int
    dtype: Any = jnp.dtype(jnp.float32)
    factor: float | None = None

    def setup(self) -> None:
        """The table, which a tied head reads too."""
        shape = (self.count, self.features)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape, self.dtype)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        """The vectors of `tokens`, adapted or not."""
        vectors = jnp.take(self.embedding, tokens, axis=0)
        for name in ("embedding", "lookup"):
            adapter = adapter_of(self, name)
            if adapter is not None:
                vectors = vectors + look_up(tokens, self.embedding, used_whole(adapter, self.path[-1]))
        return vectors if self.factor is None else vectors * jnp.asarray(self.factor, vectors.dtype)


class TiedHead(nn.Module):
    """A projection by the table of the embedding, whose adapter it has unless it has one of its own."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch d"],
        table: Float[Array, "vocab d"],
        shared: core.Adapter | None,
        ctx: core.Context = core.Context(),
    ) -> Float[Array, "*batch vocab"]:
        """x table^T, adapted or not, with dropout if the call carries an rng named `dropout`.

        - shared: the adapter of the table, if its look-ups and the head share one.
        """
        if self.has_rng("dropout"):
            ctx = dataclasses.replace(ctx, key=self.make_rng("dropout"))
        adapter = adapter_of(self)
        adapter = None if adapter is None else used_whole(adapter, self.path[-1])
        logits = core.linear(x, table.T, adapter, ctx)
        return logits if shared is None else logits + tied_head(x, table, used_whole(shared, "embed_tokens"), ctx)


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotary embedding: features (i, i + half) turn together, as Hugging Face's weights expect.

    Features after the first 2 half are left as they are.
    """
    half = cos.shape[-1]
    first, second, unrotated = jnp.split(x, (half, 2 * half), axis=-1)
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, unrotated] if unrotated.shape[-1] else rotated, axis=-1)
