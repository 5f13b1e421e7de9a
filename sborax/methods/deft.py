"""DEFT: Decompositional Efficient Fine-Tuning, a subspace of the outputs replaced."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    HIDDEN,
    AbstractMethod,
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
    matmul,
)
from sborax.adapters.linalg import qr


@dataclasses.dataclass(frozen=True)
class DEFT(AbstractMethod):
    """y = x W + (s (x a) - (x W) r) q^T: the part of x W along r is removed, and x a is added along q.

    "relu": q = p and r = relu(p). "qr": q = r = the orthonormal factor of p = q u, so that W loses its part along p.

    rank: width of p (out, rank) and a (in, rank) (PEFT: 8).
    projection: "relu" (default, as PEFT) or "qr".
    alpha: s = alpha / rank; None (default) is s = 1.
    dropout: rate on the input of a; default 0.

    p ~ N(0, 0.02^2) and a = W r / s, as PEFT: identity at init. Exact merge W + (s a - W r) q^T. PEFT's option `para`,
    which puts nothing in and cannot start at the identity, is left out. Trained parameters: rank (in + out).
    """

    paper = "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, arXiv:2509.22793"
    sends = "x W along r, rank floats a token beside those of a, and p"

    rank: int = 8
    projection: Literal["relu", "qr"] = "relu"
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {"a": ("in", "rank"), "p": ("out", "rank"), "scale": (), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, shape[1], "columns of W")
        if self.projection not in ("relu", "qr"):
            raise SboraxError(f"projection must be 'relu' or 'qr', got {self.projection!r}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        p = 0.02 * jax.random.normal(key, (weight.shape[1], self.rank))
        scale = jnp.float32(1.0 if self.alpha is None else self.alpha / self.rank)
        a = dense(weight).astype(jnp.float32) @ self._projected(p)[1] / scale
        return Fitted({"a": a, "p": p}, {"scale": scale, **dropout_leaf(self.dropout)})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        q, r = self._projected(adapter.train["p"])
        y = matmul(x, weight)
        put = cast(adapter.frozen["scale"], x) * (dropout(x, adapter, ctx) @ cast(adapter.train["a"], x))
        return y + checkpoint_name(put - y @ cast(r, y), HIDDEN) @ cast(q, y).T

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        wide = dense(weight).astype(jnp.float32)
        with jax.default_matmul_precision("highest"):
            q, r = self._projected(adapter.train["p"])
            return wide + (adapter.frozen["scale"] * adapter.train["a"] - wide @ r) @ q.T

    def _projected(self, p: Float[Array, "out rank"]) -> tuple[Float[Array, "out rank"], Float[Array, "out rank"]]:
        """(q, r)"""
        if self.projection == "relu":
            return p, jax.nn.relu(p)
        q, _ = qr(p)
        return q, q
