"""The basis that the kernels of a kind share in FRoD."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.bank import AbstractBank, Load
from sborax.adapters.core import Adapter, Axes, Fitted, Hint, SboraxError, Weight
from sborax.adapters.weight import check_finite

PAPER = "FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence, arXiv:2512.23485"


@dataclasses.dataclass(frozen=True)
class FRoDBasis(AbstractBank):
    """What the kernels of a kind share in `FRoD`: v (in, in), its inverse, and the places of the entries of S.

    With the weights W_k of all layers, [W_1 ... W_n]^T = Q R and W_k^T = Q_k R. Then v = R^T e, with e the eigenvectors
    of the mean of (Q_k^T Q_k + ridge I)^-1, a higher-order generalised SVD. Each weight is read twice, one at a time,
    while R, R^-1 and the mean, (in, in) each, are held. If all layers together have fewer outputs than inputs, v holds
    the left singular vectors of [W_1 ... W_n] instead, as in PEFT.
    """

    paper = PAPER

    fan_in: int
    fan_out: int
    entries: int
    ridge: float
    basis: Literal["weights", "peft"]

    @property
    def axes(self) -> Axes:
        return {"v": (None, None), "v_inv": (None, None), "idx": (None, None)}

    @property
    def shape(self) -> tuple[int, int]:
        return self.fan_in, self.fan_in

    def check(self, shape: tuple[int, int]) -> None:
        if self.fan_in * self.fan_in > jnp.iinfo(jnp.int32).max:
            raise SboraxError(f"{self.fan_in}^2 places are more than an int32 index can name")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        off_diagonal = self.fan_in - 1
        places = jax.random.permutation(key, self.fan_in * off_diagonal)[: self.entries].astype(jnp.int32)
        rows, columns = places // off_diagonal, places % off_diagonal
        # Places are counted without the diagonal.
        idx = jnp.stack([jnp.where(columns >= rows, columns + 1, columns), rows])
        return Fitted({}, {"v": jnp.eye(self.fan_in), "v_inv": jnp.eye(self.fan_in), "idx": idx})

    def settle(self, bank: Adapter, readers: Sequence[Adapter], weights: Sequence[Load]) -> Adapter:
        if self.basis != "weights":
            raise SboraxError(f"basis={self.basis!r} is read from PEFT's files; leave it out where V is to be made")
        with jax.default_matmul_precision("highest"):
            if self.fan_out * len(weights) < self.fan_in:
                v = jnp.linalg.svd(jnp.concatenate([load() for load in weights], axis=1), full_matrices=True)[0]
                v_inv = v.T
            else:
                v, v_inv = self._decomposed(weights)
        check_finite("v; the weights of the kind leave out a direction of their inputs", (v, v_inv))
        return dataclasses.replace(bank, frozen={**bank.frozen, "v": v, "v_inv": v_inv})

    def _decomposed(self, weights: Sequence[Load]) -> tuple[Float[Array, "in in"], Float[Array, "in in"]]:
        """R^T e and its inverse."""
        r = functools.reduce(lambda r, load: _stacked(r, load()), weights, jnp.zeros(self.shape))
        r_inv = jax.scipy.linalg.solve_triangular(r, jnp.eye(self.fan_in))
        mean = jnp.zeros(self.shape)
        for load in weights:
            mean = mean + _inverse_share(load(), r_inv, jnp.float32(self.ridge)) / len(weights)
        e = jnp.linalg.eigh(mean)[1]
        return r.T @ e, (r_inv @ e).T


@jax.jit
def _stacked(r: Float[Array, "in in"], weight: Float[Array, "in out"]) -> Float[Array, "in in"]:
    """The R of one more weight on top of those that r has."""
    return jnp.linalg.qr(jnp.concatenate([r, weight.T]), mode="r")


@jax.jit
def _inverse_share(
    weight: Float[Array, "in out"], r_inv: Float[Array, "in in"], ridge: Float[Array, ""]
) -> Float[Array, "in in"]:
    """(Q_k^T Q_k + ridge I)^-1, of Q_k = W_k^T R^-1."""
    q = weight.T @ r_inv
    return jnp.linalg.inv(q.T @ q + ridge * jnp.eye(q.shape[1]))
