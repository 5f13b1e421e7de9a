"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, ICLR 2025."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractMethod,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Rank,
    Weight,
    cast,
    check_rank,
    dense,
    dropout,
    dropout_leaf,
    hyper,
    matmul,
    width,
)
from sborax.methods.lowrank import kaiming_uniform


@dataclasses.dataclass(frozen=True)
class HiRA(AbstractMethod):
    """y = x W + x (W * (a b)), * entry by entry, a (in, rank), b (rank, out).

    rank: width of the factors (PEFT: 32), an int or a `RankPolicy`.
    dropout: rate on x in the second term; default 0.

    The step forms W * (a b), whose rank is up to that of W. The alternative would multiply by W once for every rank.
    a ~ U(-1/sqrt(in), 1/sqrt(in)), b = 0. Identity at init. Exact merge W * (1 + a b). There is no alpha.
    Trained parameters: rank (in + out).
    """

    paper = "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for LLMs, ICLR 2025, openreview TwJrTz9cRS"
    materialises = "the update multiplies the weight entry by entry, so it has no thin form"
    scales_weight = True
    ragged = True

    rank: Rank = 32
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {"a": ("in", "rank"), "b": ("rank", "out"), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        train = {"a": kaiming_uniform(key, fan_in, self.rank, hint), "b": jnp.zeros((width(self.rank), fan_out))}
        return Fitted(train, dropout_leaf(self.dropout))

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        # The product is recomputed in the backward pass: saving one per layer would be a second model.
        @jax.checkpoint
        def update(x: Array, a: Array, b: Array) -> Array:
            return x @ (cast(dense(weight), x) * (cast(a, x) @ cast(b, x)))

        # Two terms: 1 + a b would lose small changes in half precision.
        return matmul(x, weight) + update(dropout(x, adapter, ctx), adapter.train["a"], adapter.train["b"])

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        wide = dense(weight).astype(jnp.float32)
        return wide + wide * jnp.matmul(adapter.train["a"], adapter.train["b"], precision="highest")
