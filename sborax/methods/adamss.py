"""AdaMSS: an adaptive multi-subspace approach, NeurIPS 2025."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

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
from sborax.adapters.linalg import eigh
from sborax.methods.lowrank import HIDDEN, principal

ITERATIONS = 10
"""Of K-means, as in PEFT."""


@dataclasses.dataclass(frozen=True)
class AdaMSS(AbstractFactored):
    """y_j = (x W)_j + x p a[:, k] b[:, j], where k = idx[j] is the subspace of output j.

    p (in, rank) holds the leading left singular vectors of W. K-means clusters the outputs by their rows of the right
    ones; a cluster is a subspace. Each subspace has a factor a[:, k] (rank, subspace_rank), and each output has a
    column of b.

    rank: R, how many singular vectors span the inputs (PEFT: 100).
    subspaces: K (PEFT: 5).
    subspace_rank: r_k, the rank of the change of each subspace (PEFT: 1).
    dropout: rate on x; default 0, since PEFT has none.

    a[:, k] starts as the leading principal directions of the rows of its subspace, b = 0: identity at init. K-means
    starts from random rows, as in PEFT, takes 10 steps and leaves no subspace empty. Exact merge. p and idx are kept
    with the adapter. PEFT's files are not read: they lack idx, which PEFT computes again with scikit-learn's K-means on
    a randomised SVD. The change is exported as LoRA of rank subspaces * subspace_rank. PEFT appends a bias to W as one
    more input; here a bias stays as it is. The allocation that freezes subspaces in training (ASA) is not implemented.
    Trained parameters: subspace_rank (rank subspaces + out).
    """

    paper = (
        "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, NeurIPS 2025, "
        "openreview 8ZdWmpYxT0"
    )
    sends = "the factors of all subspaces, and their gradients"

    rank: int = 100
    subspaces: int = 5
    subspace_rank: int = 1
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {"a": (None, None, None), "b": (None, "out"), "p": ("in", None), "idx": ("out",), "dropout": ()}

    @property
    def summed(self) -> int:
        return self.subspaces * self.subspace_rank

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if not 1 <= self.subspaces <= shape[1]:
            raise SboraxError(f"subspaces must lie in 1..{shape[1]} (the outputs), got {self.subspaces}")
        if not 1 <= self.subspace_rank <= self.rank:
            raise SboraxError(f"subspace_rank must lie in 1..{self.rank} (the rank), got {self.subspace_rank}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        p, _, right = principal(key, dense(weight).astype(jnp.float32), self.rank, None)
        rows = right.T
        idx = clustered(key, rows, self.subspaces)
        members = jax.nn.one_hot(idx, self.subspaces)
        _, vectors = jax.vmap(eigh)(jnp.einsum("jk,jp,jq->kpq", members, rows, rows))
        a = vectors[:, :, ::-1][:, :, : self.subspace_rank].transpose(1, 0, 2)
        train = {"a": a, "b": jnp.zeros((self.subspace_rank, weight.shape[1]))}
        return Fitted(train, {"p": p, "idx": idx, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        a, b = self.factors(adapter, (x.shape[1], y.shape[1]))
        return y + checkpoint_name(dropout(x, adapter, ctx) @ cast(a, x), HIDDEN) @ cast(b, x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        a, b = self.factors(adapter, (weight.shape[0], weight.shape[1]))
        return weight + jnp.matmul(a, b, precision="highest")

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        """Of width subspaces * subspace_rank; rows of b are zero outside of their subspace."""
        members = adapter.frozen["idx"][None, :] == jnp.arange(self.subspaces)[:, None]
        b = jnp.where(members[:, None, :], adapter.train["b"][None, :, :], 0.0)
        a = jnp.matmul(adapter.frozen["p"], adapter.train["a"].reshape(self.rank, -1), precision="highest")
        return a, b.reshape(-1, shape[1])


def clustered(key: Key[Array, ""], rows: Float[Array, "n d"], count: int) -> Int[Array, " n"]:
    """The cluster of each row by K-means, from `count` of the rows. Each cluster has a row."""

    def nearest(centres: Float[Array, "k d"]) -> Float[Array, "n k"]:
        """Squared distances to the centres, less the squared length of each row."""
        return jnp.sum(jnp.square(centres), axis=1)[None, :] - 2.0 * rows @ centres.T

    def step(_: Int[Array, ""], centres: Float[Array, "k d"]) -> Float[Array, "k d"]:
        members = jax.nn.one_hot(jnp.argmin(nearest(centres), axis=1), count, dtype=rows.dtype)
        sizes = jnp.sum(members, axis=0)[:, None]
        return jnp.where(sizes > 0, members.T @ rows / jnp.maximum(sizes, 1.0), centres)

    def filled(cluster: Int[Array, ""], idx: Int[Array, " n"]) -> Int[Array, " n"]:
        """If the cluster is empty, the nearest row of those in clusters of several."""
        sizes = jnp.sum(jax.nn.one_hot(idx, count, dtype=rows.dtype), axis=0)
        row = jnp.argmin(jnp.where(sizes[idx] > 1, distances[:, cluster], jnp.inf))
        return jnp.where(sizes[cluster] > 0, idx, idx.at[row].set(cluster.astype(jnp.int32)))

    centres = rows[jax.random.permutation(key, rows.shape[0])[:count]]
    distances = nearest(jax.lax.fori_loop(0, ITERATIONS, step, centres))
    return jax.lax.fori_loop(0, count, filled, jnp.argmin(distances, axis=1).astype(jnp.int32))
