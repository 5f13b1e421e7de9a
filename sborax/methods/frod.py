"""FRoD: full-rank changes in a basis that all layers of a kind share, arXiv:2512.23485."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.bank import AbstractBank, AbstractBanked, bank_leaf
from sborax.adapters.core import (
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Leaves,
    SboraxError,
    Weight,
    cast,
    dense,
    dropout,
    dropout_leaf,
    hyper,
    matmul,
)
from sborax.methods.frod_basis import PAPER, FRoDBasis

FAINT = 1e-5
"""Rows of V^-1 W below this share of the longest are rounding errors: W has no such direction."""


@dataclasses.dataclass(frozen=True)
class FRoD(AbstractBanked):
    """y = x W', W' = V (L0 + diag(l) + S) U: W = V L0 U in a basis V of all layers of a kind, with l and S trained.

    Rows of U have length 1. S has `density` in^2 entries, away from the diagonal, at places that the kind shares.

    density: the share of entries of S that are trained (PEFT: 0.01).
    ridge: steadies the inverses in the start of V, see `FRoDBasis` (PEFT: 0.001).
    dropout: rate on the x from which the change is computed; default 0.
    basis: "weights" (default): V is computed from the base. "peft": V comes from a file of PEFT's, see below.

    U is never formed: as U = L0^-1 V^-1 W, y = (x + d) W with d = (x V) (diag(l) + S) L0^-1 V^-1. So the change does
    not suffer from rounding in V, and a kernel keeps no second weight, as it does in PEFT. On SmolLM2-135M the
    condition number of V is 2 to 10, and the change is accurate to 5e-7 in float32 and 5e-3 in bfloat16, as if U were
    held. A kind keeps V and V^-1, 8 in^2 bytes. PEFT trains L = L0 + l, so weight decay pulls W' to 0 there, to
    the base here. Directions that a weight lacks change nothing; in PEFT they have a random u, made of rounding errors.

    When PEFT loads a file, it computes V from the base again and U from this V. Then it takes V from the file. The
    eigenvectors in V depend on the library, the number of threads and everything else that changes rounding. So only a
    V that came from PEFT can be exported, and it fits only where PEFT computes the same V again.

    l = 0 and S = 0: identity at init. Exact merge. Trained parameters: in + density in^2 for each weight.
    """

    paper = PAPER
    materialises = "entries of S at random places have no product of thin factors"
    sends = "the inputs in the basis of the kind, as wide as the input"
    rank = 1
    group_b = frozenset({"l", "s"})
    bank_name = "frod"
    bank_leaves = frozenset({"v", "v_inv", "idx"})
    bank_of_kind = True
    base_leaves = {"l0": lambda weight, frozen: _lengths(weight, frozen)}

    density: float = 0.01
    ridge: float = 1e-3
    dropout: float = hyper(0.0)
    basis: Literal["weights", "peft"] = "weights"

    @property
    def axes(self) -> Axes:
        square = {"v": (None, None), "v_inv": (None, None), "idx": (None, None)}
        return {"l": (None,), "s": (None,), "l0": (None,), "dropout": (), **square}

    def bank(self, shape: tuple[int, int], readers: int) -> AbstractBank:
        return FRoDBasis(*shape, self._entries(shape[0]), self.ridge, self.basis)

    def check(self, shape: tuple[int, int]) -> None:
        if not 0.0 < self.density <= 1.0 or self.ridge <= 0.0:
            raise SboraxError(f"needs density in (0, 1] and ridge > 0, got {self.density} and {self.ridge}")
        if shape[0] < 2:
            raise SboraxError("a weight of one input has no entries away from the diagonal")
        if self.basis not in ("weights", "peft"):
            raise SboraxError(f"basis must be 'weights' or 'peft', got {self.basis!r}")

    def _entries(self, fan_in: int) -> int:
        """The number of entries of S, as PEFT counts them."""
        return min(max(1, int(fan_in * fan_in * self.density)), fan_in * (fan_in - 1))

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in = weight.shape[0]
        train = {"l": jnp.zeros(fan_in), "s": jnp.zeros(self._entries(fan_in))}
        return Fitted(train, {"l0": jnp.ones(fan_in), **dropout_leaf(self.dropout)})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        # The change is recomputed in the backward pass: saving one per layer would be a second model.
        @jax.checkpoint
        def changed(z: Array, train: Leaves) -> Array:
            return z @ cast(_change(train, adapter), z)

        z = dropout(x, adapter, ctx) @ cast(bank_leaf(adapter, "v"), x)
        return matmul(x + changed(z, adapter.train) @ cast(bank_leaf(adapter, "v_inv"), x), weight)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        wide = dense(weight).astype(jnp.float32)
        inner = _change(adapter.train, adapter) @ (bank_leaf(adapter, "v_inv") @ wide)
        return wide + bank_leaf(adapter, "v") @ inner


def _change(train: Leaves, adapter: Adapter) -> Float[Array, "in in"]:
    """(diag(l) + S) L0^-1, zero in the columns of directions that W lacks. Entries at one place add up."""
    columns, rows = bank_leaf(adapter, "idx")
    l0 = adapter.frozen["l0"]
    inner = jnp.diag(train["l"]).at[rows, columns].add(train["s"])
    return inner * jnp.where(l0 > 0.0, 1.0 / jnp.where(l0 > 0.0, l0, 1.0), 0.0)[None, :]


def _lengths(weight: Weight, frozen: Leaves) -> Float[Array, " in"]:
    """The diagonal of L0: the lengths of the rows of V^-1 W, zero for directions that W lacks."""
    lengths = jnp.linalg.norm(matmul(frozen["v_inv"], weight), axis=1)
    return jnp.where(lengths > FAINT * jnp.max(lengths), lengths, 0.0)
