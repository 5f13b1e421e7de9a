"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractFactored,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Rank,
    Weight,
    cast,
    check_rank,
    dropout,
    dropout_leaf,
    hyper,
    live,
    width,
)
from sborax.methods.lowrank import HIDDEN, PAIR_AXES, pair_weight, scaling


@dataclasses.dataclass(frozen=True)
class AdaLoRA(AbstractFactored):
    """y = x W + s ((x a) * e) b: a singular value decomposition in all but name, a (in, rank), e (rank), b (rank, out).

    Trained with `procedures.adalora.orthogonality` in the loss, which keeps the columns of a and the rows of b
    orthonormal, and with its allocator, which zeroes the least important e between steps.

    rank: the initial rank, which the allocator reduces (PEFT's `init_r`: 12).
    alpha: s = alpha / rank; None (default) is s = 1. s stays as it is when e is pruned.
    dropout: rate on x; default 0.

    a and b ~ N(0, 0.02^2), e = 0: identity at init. Exact merge. Trained parameters: rank (in + out + 1).
    """

    paper = "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv:2303.10512"
    group_b = frozenset({"b"})
    ragged = True

    rank: Rank = 12
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {**PAIR_AXES, "e": ("rank",)}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        rank, (_, mask) = width(self.rank), live(self.rank, hint)
        of_a, of_b = jax.random.split(key)
        a = 0.02 * jax.random.normal(of_a, (fan_in, rank)) * mask[None, :]
        b = 0.02 * jax.random.normal(of_b, (rank, fan_out)) * mask[:, None]
        frozen = {"scale": scaling(self.alpha, self.rank, hint), **dropout_leaf(self.dropout)}
        return Fitted({"a": a, "b": b, "e": jnp.zeros(rank)}, frozen)

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        hidden = checkpoint_name(dropout(x, adapter, ctx) @ cast(adapter.train["a"], x), HIDDEN)
        gain = cast(adapter.frozen["scale"] * adapter.train["e"], x)[None, :]
        return y + (hidden * gain) @ cast(adapter.train["b"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        train = adapter.train
        return weight + pair_weight(train["a"] * train["e"][None, :], train["b"], adapter.frozen["scale"])

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        gain = adapter.frozen["scale"] * adapter.train["e"]
        return adapter.train["a"] * gain[None, :], adapter.train["b"]
