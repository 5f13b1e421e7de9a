"""TinyLoRA: Learning to Reason in 13 Parameters, arXiv:2602.04118."""

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
    SboraxError,
    Weight,
    cast,
    check_rank,
    dense,
    dropout,
    dropout_leaf,
    hyper,
)
from sborax.methods.lowrank import HIDDEN, principal


@dataclasses.dataclass(frozen=True)
class TinyLoRA(AbstractFactored):
    """y = x W + (x a) R b, where R = v_1 P_1 + ... + v_u P_u mixes random frozen matrices P by a trained vector v.

    a (in, rank) and b (rank, out) are frozen: W = U S V^T, a = U_r sqrt(S_r), b = sqrt(S_r) V_r^T.

    rank: how many principal components are mixed (paper and PEFT: 2).
    coefficients: u, the length of v (PEFT: 64). R has rank^2 entries, so more coefficients than that reach no other R.
        The paper shares one v among kernels, which reaches 13 parameters for a whole model (PEFT: weight_tying). Here,
        as by PEFT's default, every kernel has its own.
    dropout: rate on x; default 0.

    Entries of P are normal with variance 1 / rank, as in PEFT; the paper does not say. v = 0 at init: identity. Exact
    merge. a, b and P are kept with the adapter. Trained parameters: coefficients.
    """

    paper = "Learning to Reason in 13 Parameters, arXiv:2602.04118"
    group_b = frozenset({"v"})
    sends = "the gradient of R, rank^2 floats a kernel, instead of that of v"

    rank: int = 2
    coefficients: int = 64
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {"v": (None,), "a": ("in", "rank"), "b": ("rank", "out"), "p": (None, None, None), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.coefficients < 1:
            raise SboraxError(f"coefficients must be 1 or more, got {self.coefficients}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        u, s, vt = principal(key, dense(weight).astype(jnp.float32), self.rank, None)
        root = jnp.sqrt(s)
        p = jax.random.normal(key, (self.coefficients, self.rank, self.rank)) / self.rank**0.5
        frozen = {"a": u * root[None, :], "b": root[:, None] * vt, "p": p, **dropout_leaf(self.dropout)}
        return Fitted({"v": jnp.zeros(self.coefficients)}, frozen)

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        hidden = checkpoint_name(dropout(x, adapter, ctx) @ cast(adapter.frozen["a"], x), HIDDEN)
        return y + (hidden @ cast(_mixer(adapter), x)) @ cast(adapter.frozen["b"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        a, b = self.factors(adapter, (weight.shape[0], weight.shape[1]))
        return weight + jnp.matmul(a, b, precision="highest")

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        return jnp.matmul(adapter.frozen["a"], _mixer(adapter), precision="highest"), adapter.frozen["b"]


def _mixer(adapter: Adapter) -> Float[Array, "rank rank"]:
    """R."""
    return jnp.einsum("u,ujk->jk", adapter.train["v"], adapter.frozen["p"], precision="highest")
