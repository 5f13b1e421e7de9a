"""The experts that the kernels of a kind share in Lily."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sborax.adapters.bank import AbstractBank, Load
from sborax.adapters.core import Adapter, Axes, Fitted, Hint, SboraxError, Weight


@dataclasses.dataclass(frozen=True)
class LilyExperts(AbstractBank):
    """What the kernels of a kind share in `Lily`: a (entries, in, rank) and b (experts rank, out), expert by expert."""

    paper = "Low-Rank Interconnected Adaptation across Layers, arXiv:2407.09946"

    fan_in: int
    fan_out: int
    width: int
    entries: int
    experts: int

    @property
    def axes(self) -> Axes:
        return {"a": (None, None, None), "b": (None, None)}

    @property
    def shape(self) -> tuple[int, int]:
        return self.fan_in, self.fan_out

    def check(self, shape: tuple[int, int]) -> None:
        if min(self.width, self.entries, self.experts) < 1:
            raise SboraxError(f"sizes must be at least 1, got {self.width}, {self.entries} and {self.experts}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        bound = 1.0 / math.sqrt(self.fan_in)
        a = jax.random.uniform(key, (self.entries, self.fan_in, self.width), minval=-bound, maxval=bound)
        return Fitted({"a": a, "b": jnp.zeros((self.experts * self.width, self.fan_out))}, {})

    def settle(self, bank: Adapter, readers: Sequence[Adapter], weights: Sequence[Load]) -> Adapter:
        return bank
