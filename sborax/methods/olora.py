"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, arXiv:2406.01775."""

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
from sborax.adapters.linalg import qr
from sborax.methods.lowrank import OFFSET_AXES, offset_factors, pair_delta, pair_weight, scaling, taken_from_base


@dataclasses.dataclass(frozen=True)
class OLoRA(AbstractFactored):
    """y = x W_res + s (x a) b, where the factors start from a thin QR of the weight.

    W^T = Q R;  b = Q[:, :r]^T (orthonormal rows), a = R[:r, :]^T;  W_res = W - s a b.

    rank: width of the factors.
    alpha: s = alpha / rank; None (default) is s = 1. The factors are not divided by s, as in PEFT.
    dropout: default 0.

    Identity at init. Rewrites the base; `a0`, `b0` are kept, so the change against the original base is exact at
    rank 2r. Exact merge W_res + s a b. Trained parameters: rank (in + out). The QR is of W (out, in), as published.
    """

    paper = "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, arXiv:2406.01775"
    group_b = frozenset({"b"})
    rewrites_base = True
    pair = True

    rank: int = 16
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return OFFSET_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        wide = dense(weight).astype(jnp.float32)
        q, r = qr(wide.T)
        scale = scaling(self.alpha, self.rank, hint)
        return taken_from_base(wide, r[: self.rank].T, q[:, : self.rank].T, scale, dropout_leaf(self.dropout))

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + pair_delta(x, adapter, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r2"], Float[Array, "r2 out"]]:
        return offset_factors(adapter)
