"""Shared by methods with a pair of thin factors: s (x a) b, its weight form, and initial values."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import HIDDEN, Adapter, Context, Fitted, Hint, Leaves, Rank, cast, dropout, live, width
from sborax.adapters.linalg import qr, svd


def scaling(alpha: float | None, rank: Rank, hint: Hint, stabilised: bool = False) -> Float[Array, ""]:
    """alpha / rank, or alpha / sqrt(rank) if stabilised (rsLoRA, arXiv:2312.03732); alpha None means 1.

    The rank is that of this layer, padding left out.
    """
    if alpha is None:
        return jnp.float32(1.0)
    of_layer, _ = live(rank, hint)
    return jnp.float32(alpha) / (jnp.sqrt(of_layer) if stabilised else of_layer)


def kaiming_uniform(key: Key[Array, ""], fan_in: int, rank: Rank, hint: Hint) -> Float[Array, "in rank"]:
    """a ~ U(-1/sqrt(in), 1/sqrt(in)), LoRA's released initialiser; padded columns are zero."""
    _, mask = live(rank, hint)
    bound = 1.0 / math.sqrt(fan_in)
    # Drawn as a^T, row by row, so that a column of a does not depend on the padded width.
    return jax.random.uniform(key, (width(rank), fan_in), jnp.float32, -bound, bound).T * mask[None, :]


def pair_delta(x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context) -> Float[Array, "tokens out"]:
    """s (dropout(x) a) b, the scale applied where the array is thin."""
    hidden = dropout(x, adapter, ctx) @ cast(adapter.train["a"], x)
    hidden = checkpoint_name(cast(adapter.frozen["scale"], x) * hidden, HIDDEN)
    return hidden @ cast(adapter.train["b"], x)


def pair_weight(a: Float[Array, "in rank"], b: Float[Array, "rank out"], scale: Array) -> Float[Array, "in out"]:
    """s a b."""
    return jnp.matmul(scale * a, b, precision="highest")


def offset_factors(adapter: Adapter) -> tuple[Float[Array, "in r2"], Float[Array, "r2 out"]]:
    """`([s a, -s a0], [b; b0])`: the change of the original base, which still had s a0 b0, with twice the rank."""
    scale = adapter.frozen["scale"]
    a = jnp.concatenate([scale * adapter.train["a"], -scale * adapter.frozen["a0"]], axis=-1)
    return a, jnp.concatenate([adapter.train["b"], adapter.frozen["b0"]], axis=-2)


def taken_from_base(weight: Float[Array, "in out"], a: Array, b: Array, scale: Array, extra: Leaves) -> Fitted:
    """The leaves and the rewritten base W <- W - s a b of a method that moves s a b from the base into its factors."""
    residual = weight.astype(jnp.float32) - pair_weight(a, b, scale)
    return Fitted({"a": a, "b": b}, {"a0": a, "b0": b, "scale": scale, **extra}, residual)


def principal(
    key: Key[Array, ""], matrix: Float[Array, "m n"], rank: int, niter: int | None
) -> tuple[Float[Array, "m r"], Float[Array, " r"], Float[Array, "r n"]]:
    """Leading singular triplets (u, s, vt): exact if niter is None.

    Else that many subspace iterations of Halko et al. (arXiv:0909.4061) without oversampling.
    """
    if niter is None:
        u, s, vt = svd(matrix)
        return u[:, :rank], s[:rank], vt[:rank]
    q, _ = qr(matrix @ jax.random.normal(key, (matrix.shape[1], rank)))
    for _ in range(niter):
        z, _ = qr(matrix.T @ q)
        q, _ = qr(matrix @ z)
    u, s, vt = svd(q.T @ matrix)
    return q @ u, s, vt


PAIR_AXES = {"a": ("in", "rank"), "b": ("rank", "out"), "scale": (), "dropout": ()}
OFFSET_AXES = {**PAIR_AXES, "a0": ("in", "rank"), "b0": ("rank", "out"), "left": ()}
