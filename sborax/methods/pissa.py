"""PiSSA: Principal Singular Values and Singular Vectors Adaptation, arXiv:2404.02948."""

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
    check_repetitions,
    dense,
    dropout_leaf,
    hyper,
)
from sborax.methods.lowrank import (
    OFFSET_AXES,
    offset_factors,
    pair_delta,
    pair_weight,
    principal,
    scaling,
    taken_from_base,
)


@dataclasses.dataclass(frozen=True)
class PiSSA(AbstractFactored):
    """y = x W_res + s (x a) b, where s a b starts as the best rank-r part of W and W_res is the rest.

    W = U S V^T;  a = U_r sqrt(S_r / s), b = sqrt(S_r / s) V_r^T;  W_res = W - s a b.

    rank: how many principal components are trained.
    alpha: s = alpha / rank; None (default) is s = 1, the paper's alpha = rank.
    dropout: paper 0; default 0.
    niter: None (default) for the exact SVD, else that many subspace iterations of a randomised one (recipes: 4, 16).

    Identity at init. Rewrites the base; `a0`, `b0` are kept, so the change against the original base is exact at
    rank 2r. Exact merge W_res + s a b. Trained parameters: rank (in + out).
    """

    paper = "PiSSA: Principal Singular Values and Singular Vectors Adaptation of LLMs, arXiv:2404.02948"
    group_b = frozenset({"b"})
    rewrites_base = True
    pair = True

    rank: int = 16
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)
    niter: int | None = hyper(None)

    @property
    def axes(self) -> Axes:
        return OFFSET_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        check_repetitions("niter", self.niter, 0)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        wide = dense(weight).astype(jnp.float32)
        scale = scaling(self.alpha, self.rank, hint)
        u, s, vt = principal(key, wide, self.rank, self.niter)
        root = jnp.sqrt(s / scale)
        return taken_from_base(wide, u * root[None, :], root[:, None] * vt, scale, dropout_leaf(self.dropout))

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + pair_delta(x, adapter, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r2"], Float[Array, "r2 out"]]:
        return offset_factors(adapter)
