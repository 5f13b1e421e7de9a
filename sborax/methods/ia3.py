"""IA3: infused adapter by inhibiting and amplifying inner activations, arXiv:2205.05638."""

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


@dataclasses.dataclass(frozen=True)
class IA3(AbstractMethod):
    """y = (x W + bias) * m, or y = (x * m) W + bias: one trained factor per output or input feature.

    side: "out" (default), the paper's keys and values; "in", its feed-forward activations, for the projection back to
        the residual stream (PEFT's `feedforward_modules`).

    m = 1 at init: identity. Exact merge: W[:, j] m[j] and bias[j] m[j], or m[i] W[i, :]. Trained
    parameters: out, or in.
    """

    paper = (
        "IA3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv:2205.05638"
    )
    rank = 1

    side: Literal["out", "in"] = "out"

    @property
    def axes(self) -> Axes:
        return {self._leaf: (self.side,)}

    @property
    def scales_weight(self) -> bool:
        # A scaled input is rounded before the product in both forms.
        return self.side == "out"

    @property
    def adapts_bias(self) -> bool:
        return self.side == "out"

    def check(self, shape: tuple[int, int]) -> None:
        if self.side not in ("out", "in"):
            raise SboraxError(f"side must be 'out' or 'in', got {self.side!r}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        return Fitted({self._leaf: jnp.ones(weight.shape[0 if self.side == "in" else 1])}, {})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        def scaled(y: Array) -> Array:
            return y * cast(adapter.train[self._leaf], y)[None, :]

        if self.side == "in":
            return matmul(in_float32(scaled, x), weight)
        return in_float32(scaled, matmul(x, weight))

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        m = adapter.train[self._leaf]
        return dense(weight).astype(jnp.float32) * (m[:, None] if self.side == "in" else m[None, :])

    def merge_bias(self, bias: Float[Array, " out"], weight: Weight, adapter: Adapter) -> Float[Array, " out"]:
        wide = bias.astype(jnp.float32)
        return wide * adapter.train[self._leaf] if self.adapts_bias else wide

    @property
    def _leaf(self) -> str:
        return f"m_{self.side}"
