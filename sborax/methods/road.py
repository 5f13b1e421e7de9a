"""RoAd: 2D Rotary Adaptation, arXiv:2409.00119."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractMethod,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    cast,
    dense,
    in_float32,
    matmul,
)

WIDTHS = {"1": 1, "2": 2, "4": 4}
"""Trained parameters for each output feature, by variant."""


@dataclasses.dataclass(frozen=True)
class RoAd(AbstractMethod):
    """y = (x W + bias) R: pairs (u, v) of output features become (u a cos t - v a sin t, u a sin t + v a cos t).

    variant: "1" (default, as PEFT), an angle t and a length a for each pair; "2", for each of the two results; "4", for
        each of the four terms.
    block: size of the blocks in which feature i of the first half and feature i of the second are a pair. It must be
        even and divide out (PEFT: 64).

    t = 0 and a = 1 at init: identity. Exact merge: W R and bias R. Trained parameters: out, 2 out or 4 out.
    """

    paper = (
        "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability, arXiv:2409.00119"
    )
    group_b = frozenset({"theta", "alpha"})
    adapts_bias = True
    scales_weight = True
    sends = "gradients of a cos t and a sin t instead of those of the leaves"
    rank = 1

    variant: Literal["1", "2", "4"] = "1"
    block: int = 64

    @property
    def axes(self) -> Axes:
        return {"theta": ("out",), "alpha": ("out",)}

    def check(self, shape: tuple[int, int]) -> None:
        if self.variant not in WIDTHS:
            raise SboraxError(f"variant must be one of {', '.join(map(repr, WIDTHS))}, got {self.variant!r}")
        if self.block < 2 or self.block % 2 or shape[1] % self.block:
            raise SboraxError(f"block must be even and divide {shape[1]} columns, got {self.block}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        size = weight.shape[1] * WIDTHS[self.variant] // 2
        return Fitted({"theta": jnp.zeros(size), "alpha": jnp.ones(size)}, {})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return in_float32(lambda y: self._rotate(y, adapter), matmul(x, weight))

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        return self._rotate(dense(weight).astype(jnp.float32), adapter)

    def merge_bias(self, bias: Float[Array, " out"], weight: Weight, adapter: Adapter) -> Float[Array, " out"]:
        return self._rotate(bias.astype(jnp.float32)[None, :], adapter)[0]

    def _rotate(self, y: Float[Array, "rows out"], adapter: Adapter) -> Float[Array, "rows out"]:
        """`y` R."""
        halves = y.reshape(y.shape[0], y.shape[1] // self.block, 2, self.block // 2)
        partners = jnp.stack([-halves[:, :, 1], halves[:, :, 0]], axis=2).reshape(y.shape)
        cosine, sine = self._terms(adapter)
        return y * cast(cosine, y)[None, :] + partners * cast(sine, y)[None, :]

    def _terms(self, adapter: Adapter) -> tuple[Float[Array, " out"], Float[Array, " out"]]:
        """a cos t and a sin t of every output feature."""
        half = self.block // 2
        sizes = {"1": (1, 1), "2": (1, 2), "4": (2, 2)}[self.variant]

        def spread(leaf: Float[Array, " n"]) -> Float[Array, "terms out"]:
            by_term = leaf.reshape(-1, *sizes, half)
            wide = jnp.broadcast_to(by_term, (by_term.shape[0], 2, 2, half))
            return wide.swapaxes(0, 1).reshape(2, -1)

        theta, alpha = spread(adapter.train["theta"]), spread(adapter.train["alpha"])
        return alpha[0] * jnp.cos(theta[0]), alpha[1] * jnp.sin(theta[1])
