"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, arXiv:2505.11235."""

import dataclasses

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
    check_repetitions,
    dense,
    dropout,
    dropout_leaf,
    hyper,
)
from sborax.methods.lowrank import HIDDEN, principal
from sborax.methods.rotation import rotations


@dataclasses.dataclass(frozen=True)
class PSOFT(AbstractFactored):
    """y = x W + ((((x a) * g) R) * h - x a) b: the principal part a b of W is rotated by R and scaled by g and h.

    a (in, rank) and b (rank, out) are frozen: W = U S V^T, a = U_r, b = S_r V_r^T. R = (I - Q)(I + Q)^-1 with a
    skew-symmetric Q (rank, rank), exactly orthogonal, or its Neumann series.

    rank: how many principal components are rotated (PEFT: 32).
    terms: length of the series, at least 4 (PEFT: 5 if use_cayley_neumann=True), or None for the exact R (PEFT's
        default).
    scaled: whether g and h are trained (PEFT: psoft_mag_a and psoft_mag_b, True); else they are 1.
    dropout: rate on x in the second term; default 0.

    Trained are the entries of Q above the diagonal, row by row, and g and h. PEFT's psoft_alpha cancels out. Q = 0 and
    g = h = 1 at init: identity. Exact merge. Trained parameters: rank (rank - 1) / 2, and 2 rank if scaled.
    """

    paper = "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, arXiv:2505.11235"
    group_b = frozenset({"q", "g", "h"})
    sends = "the gradient of the rotation, rank^2 floats a kernel, instead of that of its angles"

    rank: int = 32
    terms: int | None = None
    scaled: bool = True
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        vectors: Axes = {"q": (None,), "g": (None,), "h": (None,)}
        return {**vectors, "a": ("in", "rank"), "b": ("rank", "out"), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.rank < 2:
            raise SboraxError(f"rank must be at least 2, got {self.rank}: there is nothing to rotate")
        if self.terms is not None and self.terms < 4:
            raise SboraxError(f"terms must be None or at least 4, got {self.terms}")
        check_repetitions("terms", self.terms, 4)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        u, s, vt = principal(key, dense(weight).astype(jnp.float32), self.rank, None)
        train = {"q": jnp.zeros(self.rank * (self.rank - 1) // 2)}
        if self.scaled:
            train |= {"g": jnp.ones(self.rank), "h": jnp.ones(self.rank)}
        return Fitted(train, {"a": u, "b": s[:, None] * vt, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        hidden = checkpoint_name(dropout(x, adapter, ctx) @ cast(adapter.frozen["a"], x), HIDDEN)
        return y + (hidden @ cast(self._change(adapter), x)) @ cast(adapter.frozen["b"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        a, b = self.factors(adapter, (weight.shape[0], weight.shape[1]))
        return weight + jnp.matmul(a, b, precision="highest")

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        return jnp.matmul(adapter.frozen["a"], self._change(adapter), precision="highest"), adapter.frozen["b"]

    def _change(self, adapter: Adapter) -> Float[Array, "rank rank"]:
        """diag(g) R diag(h) - I."""
        q = adapter.train["q"][None]
        # The series is that of the inverse, hence of -Q.
        r = rotations(q if self.terms is None else -q, self.rank, self.terms)[0]
        if self.scaled:
            r = adapter.train["g"][:, None] * r * adapter.train["h"][None, :]
        return r - jnp.eye(self.rank)
