"""The bank of vectors from which a model's factors are mixed."""

import dataclasses
from collections.abc import Sequence

import jax
from jaxtyping import Array, Key

from sborax.adapters.bank import AbstractBank, Load
from sborax.adapters.core import Adapter, Axes, Fitted, Hint, SboraxError, Weight, hyper


@dataclasses.dataclass(frozen=True)
class VectorBank(AbstractBank):
    """The vectors that `VBLoRA` mixes: (vectors, length). See there for the options."""

    paper = "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, arXiv:2405.15179"

    vectors: int
    length: int
    bound: float = hyper()

    @property
    def axes(self) -> Axes:
        return {"bank": (None, None)}

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors, self.length

    def check(self, shape: tuple[int, int]) -> None:
        if min(self.shape) < 1:
            raise SboraxError(f"vectors and length must be at least 1, got {self.vectors} and {self.length}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        return Fitted({"bank": jax.random.uniform(key, self.shape, minval=-self.bound, maxval=self.bound)}, {})

    def settle(self, bank: Adapter, readers: Sequence[Adapter], weights: Sequence[Load]) -> Adapter:
        return bank
