"""Importance of groups of weights: the criteria for structured pruning that arXiv:2305.18403 compares."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import Adapter, pair_of


def lora_change(
    a: Float[Array, "in rank"],
    b: Float[Array, "rank out"],
    grad_a: Float[Array, "in rank"],
    grad_b: Float[Array, "rank out"],
) -> Float[Array, "in out"]:
    """G = a grad_b + grad_a b - grad_a grad_b = a b - (a - grad_a)(b - grad_b): LoRA's stand-in for dL/dW."""
    with jax.default_matmul_precision("highest"):
        return a @ grad_b + grad_a @ (b - grad_b)


class AbstractCriterion(abc.ABC):
    """The order in which groups are pruned. Concrete criteria are frozen dataclasses."""

    pair: bool
    """The change of every adapted weight must be s a b."""
    full: bool = False
    """`factor` reads the gradient of the base weight, which is that of the merged one for additive methods alone."""

    @abc.abstractmethod
    def factor(self, weight: Float[Array, "in out"], node: Adapter, grad: Mapping[str, Any]) -> Float[Array, "in out"]:
        """G, by which weights are multiplied before their absolute values are summed over a group.

        Args:
        - weight: with the adapter's change.
        - node: the adapter.
        - grad: of its trained leaves; if `full`, of the base weight alone, under `kernel`.
        """

    def order(self, key: Key[Array, ""], scores: Float[Array, "*stack groups"]) -> Float[Array, "*stack groups"]:
        """Numbers of which the least are pruned first. By default the running scores."""
        return scores


@dataclasses.dataclass(frozen=True)
class LoRAGradient(AbstractCriterion):
    """|G * (W + s a b)| with G from the gradients of a and b: LoRAPrune's own criterion."""

    pair = True

    def factor(self, weight: Float[Array, "in out"], node: Adapter, grad: Mapping[str, Any]) -> Float[Array, "in out"]:
        _, a, b = pair_of(node)
        return lora_change(a, b, grad["a"], grad["b"])


@dataclasses.dataclass(frozen=True)
class Magnitude(AbstractCriterion):
    """|W + change|, for every method that merges."""

    pair = False

    def factor(self, weight: Float[Array, "in out"], node: Adapter, grad: Mapping[str, Any]) -> Float[Array, "in out"]:
        return jnp.ones_like(weight)


@dataclasses.dataclass(frozen=True)
class RandomOrder(AbstractCriterion):
    """Any group as likely as any other, drawn at every pruning, for every method that merges: a control."""

    pair = False

    def factor(self, weight: Float[Array, "in out"], node: Adapter, grad: Mapping[str, Any]) -> Float[Array, "in out"]:
        return jnp.zeros_like(weight)

    def order(self, key: Key[Array, ""], scores: Float[Array, "*stack groups"]) -> Float[Array, "*stack groups"]:
        return jax.random.uniform(key, scores.shape, scores.dtype)


@dataclasses.dataclass(frozen=True)
class FullGradient(AbstractCriterion):
    """|dL/dW * (W + change)|, the first-order importance that LoRA's gradients stand in for."""

    pair = False
    full = True

    def factor(self, weight: Float[Array, "in out"], node: Adapter, grad: Mapping[str, Any]) -> Float[Array, "in out"]:
        return grad["kernel"].astype(jnp.float32)


CRITERIA: Mapping[str, AbstractCriterion] = {
    "lora": LoRAGradient(),
    "magnitude": Magnitude(),
    "random": RandomOrder(),
    "grad": FullGradient(),
}
"""Criteria by the name of the metric."""
