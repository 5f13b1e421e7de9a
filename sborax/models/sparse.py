"""Mixtures of experts in place of a dense MLP: a router, grouped projections and their weighted sum."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sborax.adapters import core
from sborax.adapters.grouped import expert_of_row, grouped_linear
from sborax.adapters.routing import GATE
from sborax.models.config import Experts
from sborax.models.layers import GatedUnit
from sborax.models.sharding import sent_packed, used_whole

ROUTER_WEIGHT = "router/weight"
"""The end of the path of a router's weight."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Load:
    """How the routers of all layers spread tokens over experts, summed over layers.

    - chosen: how often each expert was chosen.
    - probability: the sum of each expert's probabilities.
    - tokens: how many tokens were routed.
    - partition: the sum of (log sum_e exp l_e)^2 over tokens, l_e the logits of the router.
    """

    chosen: Float[Array, " experts"]
    probability: Float[Array, " experts"]
    tokens: Float[Array, ""]
    partition: Float[Array, ""]

    def imbalance(self) -> Float[Array, ""]:
        """E sum_e f_e p_e: E experts, f_e the share of tokens that chose e, p_e its mean probability.

        It is the number of experts of a token if all are equally likely. As in transformers, f and p are means over all
        layers. [arXiv:2101.03961]
        """
        return self.chosen.size * jnp.sum(self.chosen * self.probability) / jnp.square(self.tokens)

    def z_loss(self) -> Float[Array, ""]:
        """The mean of (log sum_e exp l_e)^2 over tokens and layers, which keeps logits small. [arXiv:2202.08906]"""
        return self.partition / self.tokens


def load_of(routing: Mapping[str, Array]) -> Load | None:
    """The load from the values of collection `routing` by path; None without routers of experts."""
    sums = {
        name: [leaf for path, leaf in routing.items() if path.endswith(f"router/{name}")]
        for name in ("chosen", "probability", "tokens", "partition")
    }
    if not sums["tokens"]:
        return None
    experts = sums["chosen"][0].shape[-1]
    chosen, probability = (
        sum(jnp.sum(leaf.reshape(-1, experts), axis=0) for leaf in sums[name]) for name in ("chosen", "probability")
    )
    tokens, partition = (sum(map(jnp.sum, sums[name])) for name in ("tokens", "partition"))
    return Load(*map(jnp.asarray, (chosen, probability, tokens, partition)))


class Router(nn.Module):
    """p = softmax(x W) over experts in float32, and the `chosen` largest of each token."""

    experts: Experts
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "tokens d"], mask: Array | None = None
    ) -> tuple[Float[Array, "tokens chosen"], Int[Array, "tokens chosen"]]:
        """The weights and the numbers of the experts of each token.

        A call that makes collection `routing` mutable finds there how the tokens of the batch were routed.

        - mask: (tokens,), zero at padding, which is not counted.
        """
        shape = (x.shape[-1], self.experts.count)
        weight = self.param("weight", nn.initializers.normal(0.02), shape, self.dtype)
        logits = (x @ weight.astype(x.dtype)).astype(jnp.float32)
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, numbers = jax.lax.top_k(probabilities, self.experts.chosen)
        if self.is_mutable_collection("routing") and not self.is_initializing():
            counted = jnp.ones(x.shape[0]) if mask is None else (mask != 0).astype(jnp.float32)
            chosen = jnp.sum(jax.nn.one_hot(numbers, self.experts.count), axis=1)
            self.put_variable("routing", "chosen", counted @ chosen)
            self.put_variable("routing", "probability", counted @ probabilities)
            self.put_variable("routing", "tokens", jnp.sum(counted))
            self.put_variable("routing", "partition", counted @ jnp.square(jax.nn.logsumexp(logits, axis=-1)))
        if self.experts.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights.astype(x.dtype), numbers


class GroupedLinear(nn.Module):
    """The projections of all experts of a layer: `layers.Linear` for rows that are sorted by expert.

    The kernel is (experts, in, out). Collections are those of `Linear`, with an axis of experts.
    """

    experts: int
    features: int
    dtype: Any = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(
        self, x: Float[Array, "rows in"], sizes: Int[Array, " experts"], ctx: core.Context = core.Context()
    ) -> Float[Array, "rows out"]:
        """The adapted projection of each row by its expert, with dropout if the call carries an rng named `dropout`."""
        if self.has_variable("params", "kernel"):
            kernel = sent_packed(self.get_variable("params", "kernel"), self.path[-1])
        else:
            shape = (self.experts, x.shape[-1], self.features)
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
        if self.has_rng("dropout"):
            ctx = dataclasses.replace(ctx, key=self.make_rng("dropout"))
        ctx = ctx.at("/".join(self.path), GATE)
        if self.is_mutable_collection("observations") and not self.is_initializing():
            self.put_variable("observations", "kernel", expert_norms(x, sizes, ctx.mask))
        adapter = self.get_variable("adapters", "kernel")
        adapter = None if adapter is None else used_whole(adapter, self.path[-1])
        return grouped_linear(x, kernel, sizes, adapter, ctx)


def expert_norms(
    x: Float[Array, "rows in"], sizes: Int[Array, " experts"], mask: Array | None = None
) -> Float[Array, "experts in"]:
    """||X_j|| over the rows of each expert for each input feature j, float32, without a gradient.

    mask: (rows,), zero at padding.
    """
    wide = jnp.square(jax.lax.stop_gradient(x).astype(jnp.float32))
    if mask is not None:
        wide = jnp.where((mask != 0)[:, None], wide, 0.0)
    experts = expert_of_row(sizes, x.shape[0])
    return jnp.sqrt(jax.ops.segment_sum(wide, experts, sizes.size, indices_are_sorted=True))


class SparseMLP(nn.Module):
    """sum_e p_e down_e(f(gate_e(x)) * up_e(x)) over the experts e that the router chose for a token.

    No token is dropped: rows are sorted by expert, whatever the load. [arXiv:2211.15841]
    """

    experts: Experts
    activation: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d"], ctx: core.Context) -> Float[Array, "batch seq d"]:
        """The mixture, and the shared expert's output if there is one."""
        experts, d = self.experts, x.shape[-1]
        flat, by_token = x.reshape(-1, d), ctx.flatten(x.shape[:-1])
        weights, numbers = Router(experts, self.dtype, name="router")(flat, by_token.mask)
        order = jnp.argsort(numbers.reshape(-1), stable=True)
        sizes = jnp.bincount(numbers.reshape(-1), length=experts.count).astype(jnp.int32)
        token = order // experts.chosen
        mixed = Mixture(experts, self.activation, self.dtype, name="experts")(flat[token], sizes, by_token.take(token))
        mixed = mixed[jnp.argsort(order)].reshape(-1, experts.chosen, d)
        y = jnp.einsum("tkd,tk->td", mixed, weights).reshape(x.shape)
        if not experts.shared_size:
            return y
        shared = GatedUnit(experts.shared_size, self.activation, dtype=self.dtype, name="shared_expert")(x, ctx)
        return y + jnp.broadcast_to(Gate(self.dtype, name="shared_expert_gate")(x), x.shape) * shared


class Mixture(nn.Module):
    """The gated units of all experts."""

    experts: Experts
    activation: Any
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "rows d"], sizes: Int[Array, " experts"], ctx: core.Context
    ) -> Float[Array, "rows d"]:
        """down(f(gate(x)) * up(x)) of each row by its expert."""
        count, width = self.experts.count, self.experts.intermediate_size
        gate, up = (
            checkpoint_name(GroupedLinear(count, width, self.dtype, name=name)(x, sizes, ctx), "gate_up")
            for name in ("gate_proj", "up_proj")
        )
        down = GroupedLinear(count, x.shape[-1], self.dtype, name="down_proj")
        return down(self.activation(gate) * up, sizes, ctx)


class Gate(nn.Module):
    """sigmoid(x w), one number a token."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d"]) -> Float[Array, "batch seq 1"]:
        """How much of the shared expert each token gets."""
        weight = self.param("weight", nn.initializers.normal(0.02), (x.shape[-1], 1), self.dtype)
        return jax.nn.sigmoid(x @ weight.astype(x.dtype))
