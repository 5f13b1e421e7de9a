"""MiCA: Minor Component Adaptation, arXiv:2604.01694."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractFactored,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Weight,
    check_rank,
    dense,
    dropout_leaf,
    hyper,
)
from sborax.adapters.linalg import svd
from sborax.methods.lowrank import PAIR_AXES, pair_delta, pair_weight, scaling


@dataclasses.dataclass(frozen=True)
class MiCA(AbstractFactored):
    """y = x W + s (x a) b, where b is fixed to the output directions in which W is weakest, and only a is trained.

    W = U S V^T;  b = the last r rows of V^T, a = 0.

    rank: how many directions (default 8).
    alpha: s = alpha / rank; None (default) is s = 1.
    dropout: rate on the adapter's input in training (default 0).

    Follows PEFT's code. Identity at init. The base stays as it is. Exact merge W + s a b. Trained parameters: rank in.
    """

    paper = "Minor Component Adaptation, arXiv:2604.01694"

    rank: int = 8
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return PAIR_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        wide = dense(weight).astype(jnp.float32)
        _, _, vt = svd(wide)
        a, scale = jnp.zeros((wide.shape[0], self.rank)), scaling(self.alpha, self.rank, hint)
        return Fitted({"a": a}, {"b": vt[len(vt) - self.rank :], "scale": scale, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + pair_delta(x, _paired(adapter), ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + pair_weight(adapter.train["a"], adapter.frozen["b"], adapter.frozen["scale"])

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        return adapter.frozen["scale"] * adapter.train["a"], adapter.frozen["b"]


def _paired(adapter: Adapter) -> Adapter:
    """The adapter with both factors in its trained half, where `pair_delta` reads them."""
    return dataclasses.replace(adapter, train={**adapter.train, "b": adapter.frozen["b"]})
