"""Decompositions that `vmap` runs one after the other on a CPU.

jaxlib 0.10 divides a batch of decompositions among the threads of XLA:CPU, and the thread that divides it waits for the
others. Once every thread waits, the program never ends. With two threads, two independent batches are enough, such as
of 30 QR decompositions of 576 x 16 each. jaxlib 0.11.2 decomposes one matrix after the other. These functions do the
same, in a loop around LAPACK; accelerators get batches.

All arguments are one matrix; `jax.vmap` makes batches. Derivatives of `qr` and `inverse` do not decompose again.
Those of the others are JAX's own, which do, in batches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class QR(NamedTuple):
    """Orthonormal columns and an upper triangle, k = min(rows, columns)."""

    q: Float[Array, "rows k"]
    r: Float[Array, "k columns"]


class SVD(NamedTuple):
    """Singular vectors and values, the largest value first, k = min(rows, columns)."""

    u: Float[Array, "rows k"]
    s: Float[Array, " k"]
    vt: Float[Array, "k columns"]


class Eigh(NamedTuple):
    """Eigenvalues, the smallest first, and eigenvectors in columns."""

    values: Float[Array, " n"]
    vectors: Float[Array, "n n"]


def sequential_on_cpu(operation: Callable[[Array], Any]) -> Any:
    """The `operation` of a matrix, which `vmap` turns into a loop on a CPU and into a batch elsewhere.

    Its derivative is that of `operation`, unless `defjvp` gives another one.
    """
    looped = jax.custom_batching.sequential_vmap(operation)

    @jax.custom_jvp
    @functools.wraps(operation)
    def decomposition(matrix: Array) -> Any:
        return jax.lax.platform_dependent(matrix, cpu=looped, default=operation)

    # `sequential_vmap` alone has no reverse mode.
    decomposition.defjvp(lambda matrix, tangent: jax.jvp(operation, matrix, tangent))
    return decomposition


@sequential_on_cpu
def qr(matrix: Float[Array, "rows columns"]) -> QR:
    """The reduced QR decomposition. Its derivative is that of a matrix with at least as many rows as columns."""
    return QR(*jnp.linalg.qr(matrix))


@qr.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[QR, QR]:
    (matrix,), (tangent,) = primals, tangents
    if matrix.shape[0] < matrix.shape[1]:
        raise NotImplementedError(f"qr has no derivative for a matrix of more columns than rows, {matrix.shape}")
    with jax.default_matmul_precision("highest"):
        q, r = qr(matrix)
        change = tangent @ inverse(r)
        inside = q.T @ change
        # q^T dq is skew-symmetric, and dr r^-1 is upper triangular.
        turn = jnp.tril(inside, -1)
        turn = turn - turn.T
        return QR(q, r), QR(q @ (turn - inside) + change, (inside - turn) @ r)


@sequential_on_cpu
def inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of an invertible matrix."""
    return jnp.linalg.inv(matrix)


@inverse.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    result = inverse(*primals)
    with jax.default_matmul_precision("highest"):
        return result, -result @ tangents[0] @ result


@sequential_on_cpu
def svd(matrix: Float[Array, "rows columns"]) -> SVD:
    """The reduced singular value decomposition."""
    return SVD(*jnp.linalg.svd(matrix, full_matrices=False))


@sequential_on_cpu
def singular_values(matrix: Float[Array, "rows columns"]) -> Float[Array, " k"]:
    """The k = min(rows, columns) singular values, the largest first."""
    return jnp.linalg.svd(matrix, compute_uv=False)


@sequential_on_cpu
def eigh(matrix: Float[Array, "n n"]) -> Eigh:
    """Eigenvalues and eigenvectors of a symmetric matrix."""
    return Eigh(*jnp.linalg.eigh(matrix))


@sequential_on_cpu
def eigenvalues(matrix: Float[Array, "n n"]) -> Float[Array, " n"]:
    """Eigenvalues of a symmetric matrix, the smallest first."""
    return jnp.linalg.eigvalsh(matrix)


def pinv(matrix: Float[Array, "rows columns"], rtol: float) -> Float[Array, "columns rows"]:
    """The pseudo-inverse, in which singular values of at most `rtol` times the largest count as zero."""
    with jax.default_matmul_precision("highest"):
        u, s, vt = svd(matrix)
        kept = s > rtol * s[0]
        return (vt.T * jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)[None, :]) @ u.T
