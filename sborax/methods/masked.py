"""Multiplies an adapter's output by a 0/1 mask, for pruning."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import AbstractComposite, AbstractMethod, Adapter, Axes, Context, Fitted, Hint, Weight, cast


@dataclasses.dataclass(frozen=True)
class Masked(AbstractComposite):
    """y = mask * part(x): outputs whose mask is 0 are zero, base and bias included. All are 1 at init.

    part: the method whose outputs are masked. Exact merge: columns of zeros.
    """

    paper = "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning, arXiv:2305.18403"
    rank = 1
    part: AbstractMethod

    @property
    def members(self) -> tuple[AbstractMethod, ...]:
        return (self.part,)

    @property
    def axes(self) -> Axes:
        return {"part": self.part.axes, "mask": ("out",)}

    @property
    def identity_at_init(self) -> bool:
        return self.part.identity_at_init

    @property
    def adapts_bias(self) -> bool:
        return True

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fitted = self.part.init(key, weight, hint)
        mask = jnp.ones((weight.shape[1],), jnp.float32)
        return Fitted({"part": fitted.train}, {"part": fitted.frozen, "mask": mask}, fitted.weight)

    def children(self, adapter: Adapter) -> list[tuple[Adapter, tuple[int, ...] | None]]:
        return [
            (Adapter(adapter.train.get("part", {}), adapter.frozen.get("part", {}), self.part, adapter.in_axes), None)
        ]

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        ((child, _),) = self.children(adapter)
        y = self.part.apply(x, weight, child, ctx)
        return y * cast(adapter.frozen["mask"], y)[None, :]

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        ((child, _),) = self.children(adapter)
        return self.part.merge(weight, child) * adapter.frozen["mask"][None, :]

    def merge_bias(self, bias: Float[Array, " out"], weight: Weight, adapter: Adapter) -> Float[Array, " out"]:
        ((child, _),) = self.children(adapter)
        return self.part.merge_bias(bias, weight, child) * adapter.frozen["mask"]
