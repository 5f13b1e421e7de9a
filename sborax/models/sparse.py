"""Mixtures of experts in place of a dense MLP: a router, grouped projections and their weighted sum."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sborax.adapters import core
from sborax.adapters.constraints import ROWS, dividing
from sborax.models.config import Experts
from sborax.models.layers import GatedUnit, adapter_of
from sborax.models.mixture import Mixture, Projection, mixed

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
    - dropped: how many choices experts dropped beyond their capacity; None without one.
    """

    chosen: Float[Array, " experts"]
    probability: Float[Array, " experts"]
    tokens: Float[Array, ""]
    partition: Float[Array, ""]
    dropped: Float[Array, ""] | None = None

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
    counts, probability = (
        sum(jnp.sum(leaf.reshape(-1, experts), axis=0) for leaf in sums[name]) for name in ("chosen", "probability")
    )
    tokens, partition = (sum(map(jnp.sum, sums[name])) for name in ("tokens", "partition"))
    lost = [leaf for path, leaf in routing.items() if path.endswith("experts/dropped")]
    dropped = jnp.asarray(sum(map(jnp.sum, lost))) if lost else None
    counts, probability, tokens, partition = map(jnp.asarray, (counts, probability, tokens, partition))
    return Load(counts, probability, tokens, partition, dropped)


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
        weights, numbers = largest(probabilities, self.experts.chosen)
        if self.is_mutable_collection("routing") and not self.is_initializing():
            counted = jnp.ones(x.shape[0]) if mask is None else (mask != 0).astype(jnp.float32)
            choices = jnp.sum(jax.nn.one_hot(numbers, self.experts.count), axis=1)
            self.put_variable("routing", "chosen", counted @ choices)
            self.put_variable("routing", "probability", counted @ probabilities)
            self.put_variable("routing", "tokens", jnp.sum(counted))
            self.put_variable("routing", "partition", counted @ jnp.square(jax.nn.logsumexp(logits, axis=-1)))
        if self.experts.normalised:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights.astype(x.dtype), numbers


def largest(
    probabilities: Float[Array, "tokens experts"], count: int
) -> tuple[Float[Array, "tokens chosen"], Int[Array, "tokens chosen"]]:
    """The `count` largest numbers of each token, and their places. On a mesh each device sorts those of its tokens."""

    def of_device(probabilities: Array) -> tuple[Array, Array]:
        values, places = jax.lax.top_k(probabilities, count)
        return values, places

    axes = dividing(probabilities.shape[0], ROWS)
    if not axes:
        return of_device(probabilities)
    # The compiler would gather the probabilities of all tokens on every device.
    rows = PartitionSpec(axes)
    sharded = jax.shard_map(of_device, in_specs=rows, out_specs=(rows, rows), axis_names=set(axes), check_vma=False)
    return sharded(probabilities)


class GroupedLinear(nn.Module):
    """The projections of all experts of a layer: `layers.Linear` for rows that are sorted by expert.

    The kernel is (experts, in, out). Collections are those of `Linear`, with an axis of experts.
    """

    experts: int
    fan_in: int
    features: int
    dtype: Any = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self) -> Projection:
        """The adapted projection, with dropout if the call carries an rng named `dropout`."""
        if self.has_variable("params", "kernel"):
            kernel = self.get_variable("params", "kernel")
        else:
            shape = (self.experts, self.fan_in, self.features)
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None
        return Projection(kernel, adapter_of(self), key, "/".join(self.path))

    def observe(self, squares: Float[Array, "experts in"]) -> None:
        """Put the norms of the input features of each expert into collection `observations`."""
        self.put_variable("observations", "kernel", jnp.sqrt(squares))


class SparseMLP(nn.Module):
    """sum_e p_e down_e(f(gate_e(x)) * up_e(x)) over the experts e that the router chose for a token.

    No token is dropped: rows are sorted by expert, whatever the load. [arXiv:2211.15841]

    - capacity: a factor with which experts drop tokens after all, see `mixture.Mixture.limited`.
    """

    experts: Experts
    activation: Any
    dtype: Any
    capacity: float | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d"], ctx: core.Context) -> Float[Array, "batch seq d"]:
        """The mixture, and the shared expert's output if there is one."""
        experts = self.experts
        flat, by_token = x.reshape(-1, x.shape[-1]), ctx.flatten(x.shape[:-1])
        weights, numbers = Router(experts, self.dtype, name="router")(flat, by_token.mask)
        units = GatedUnits(experts, self.activation, self.dtype, self.capacity, name="experts")
        y = units(flat, weights, numbers, by_token).reshape(x.shape)
        if not experts.shared_size:
            return y
        shared = GatedUnit(experts.shared_size, self.activation, dtype=self.dtype, name="shared_expert")(x, ctx)
        return y + jnp.broadcast_to(Gate(self.dtype, name="shared_expert_gate")(x), x.shape) * shared


class GatedUnits(nn.Module):
    """The gated units of all experts."""

    experts: Experts
    activation: Any
    dtype: Any
    capacity: float | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "tokens d"],
        weights: Float[Array, "tokens chosen"],
        numbers: Int[Array, "tokens chosen"],
        ctx: core.Context,
    ) -> Float[Array, "tokens d"]:
        """The weighted sum of down(f(gate(x)) * up(x)) over the chosen experts of each token.

        A call that makes collection `routing` mutable finds there how many choices were dropped beyond a capacity.
        """
        count, width, d = self.experts.count, self.experts.intermediate_size, x.shape[-1]
        sides = {"gate_proj": (d, width), "up_proj": (d, width), "down_proj": (width, d)}
        modules = {name: GroupedLinear(count, *sides[name], self.dtype, name=name) for name in sides}
        projections = {name: module() for name, module in modules.items()}
        observed = self.is_mutable_collection("observations") and not self.is_initializing()
        form = Mixture(self.activation, observed, self.capacity)
        y, squares, dropped = mixed(x, weights, numbers, ctx, projections, form)
        if dropped is not None and self.is_mutable_collection("routing") and not self.is_initializing():
            self.put_variable("routing", "dropped", dropped)
        for name, sums in squares.items():
            modules[name].observe(sums)
        return y


class Gate(nn.Module):
    """sigmoid(x w), one number a token."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "batch seq d"]) -> Float[Array, "batch seq 1"]:
        """How much of the shared expert each token gets."""
        weight = self.param("weight", nn.initializers.normal(0.02), (x.shape[-1], 1), self.dtype)
        return jax.nn.sigmoid(x @ weight.astype(x.dtype))
