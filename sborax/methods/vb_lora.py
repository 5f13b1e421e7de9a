"""VB-LoRA: one bank of vectors for the whole model, arXiv:2405.15179."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.bank import AbstractBank, AbstractBanked, bank_leaf
from sborax.adapters.core import (
    AbstractFactored,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    cast,
    check_rank,
    dropout,
    dropout_leaf,
    hyper,
)
from sborax.methods.lowrank import HIDDEN
from sborax.methods.vector_bank import VectorBank


@dataclasses.dataclass(frozen=True)
class VBLoRA(AbstractFactored, AbstractBanked):
    """y = x W + (x a) b: columns of a and rows of b are made of sub-vectors, mixed from a bank that the model shares.

    Sub-vector j of column r is sum_k p_k bank[k] over the `top_k` largest logits l_k = logits_a[r, j], p = softmax of
    these; rows of b likewise. Logits have a gradient where they are among the largest.

    rank: width of the factors (PEFT: 4).
    vectors: how many the bank has (PEFT: 256). length: of each, a divisor of all sides (PEFT: 256).
    top_k: how many are mixed (PEFT: 2).
    bound: the bank starts uniform in [-bound, bound] (PEFT: 0.02).
    logits_std: logits start normal with this deviation (PEFT: 0.1).
    dropout: rate on x; default 0.

    Not the identity at init, since neither factor is zero. Exact merge. The bank is one array for all kernels, so rules
    must agree on vectors, length and bound.
    Trained parameters: rank (in + out) / length * vectors for each weight, and vectors * length once.
    """

    paper = "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks, arXiv:2405.15179"
    identity_at_init = False
    sends = "the factors that are made of the bank, and their gradients"
    bank_name = "vectors"
    bank_leaves = frozenset({"bank"})

    rank: int = 4
    vectors: int = 256
    length: int = 256
    top_k: int = 2
    bound: float = hyper(0.02, above=0.0)
    logits_std: float = hyper(0.1, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        logits = ("rank", None, None)
        return {"logits_a": logits, "logits_b": logits, "bank": (None, None), "dropout": ()}

    def bank(self, shape: tuple[int, int], readers: int) -> AbstractBank:
        return VectorBank(self.vectors, self.length, self.bound)

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if not 1 <= self.top_k <= self.vectors:
            raise SboraxError(f"top_k must lie in 1..{self.vectors} (the vectors of the bank), got {self.top_k}")
        if self.length < 1 or shape[0] % self.length or shape[1] % self.length:
            raise SboraxError(f"length must divide both sides, got {self.length}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        sides = dict(zip(("logits_a", "logits_b"), weight.shape, strict=True))
        keys = dict(zip(sides, jax.random.split(key), strict=True))
        train = {
            name: self.logits_std * jax.random.normal(keys[name], (self.rank, side // self.length, self.vectors))
            for name, side in sides.items()
        }
        return Fitted(train, dropout_leaf(self.dropout))

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        a, b = self.factors(adapter, (x.shape[1], y.shape[1]))
        return y + checkpoint_name(dropout(x, adapter, ctx) @ cast(a, x), HIDDEN) @ cast(b, x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        a, b = self.factors(adapter, (weight.shape[0], weight.shape[1]))
        return weight + jnp.matmul(a, b, precision="highest")

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        return self._mixed(adapter, "logits_a").T, self._mixed(adapter, "logits_b")

    def _mixed(self, adapter: Adapter, logits: str) -> Float[Array, "rank side"]:
        largest, places = jax.lax.top_k(adapter.train[logits], self.top_k)
        shares = jax.nn.softmax(largest, axis=-1)
        vectors = jnp.sum(shares[..., None] * bank_leaf(adapter, "bank")[places], axis=-2)
        return vectors.reshape(self.rank, -1)
