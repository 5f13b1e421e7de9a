"""Decompositions that `vmap` runs one after the other on a CPU.

jaxlib 0.10 divides a batch of decompositions among the threads of XLA:CPU, and the thread that divides it waits for the
others. Once every thread waits, the program never ends. With two threads, two independent batches are enough, such as
of 30 QR decompositions of 576 x 16 each. jaxlib 0.11.2 decomposes one matrix after the other. These functions do the
same, in a loop around LAPACK; accelerators get batches.

All arguments are one matrix; `jax.vmap` makes batches. Derivatives of `qr` and `inverse` do not decompose again.
Those of the others are JAX's own, which do, in batches.
"""

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


def one_by_one(operation: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """The `operation` of a matrix, which `vmap` turns into a loop on a CPU and into a batch elsewhere."""
    looped = jax.custom_batching.sequential_vmap(operation)

    @jax.custom_jvp
    def decomposed(matrix: Array) -> Any:
        return jax.lax.platform_dependent(matrix, cpu=looped, default=operation)

    # A function with a rule of its own for batches has no reverse mode.
    decomposed.defjvp(lambda matrix, tangent: jax.jvp(operation, matrix, tangent))
    return decomposed


_qr = one_by_one(lambda matrix: QR(*jnp.linalg.qr(matrix)))
_svd = one_by_one(lambda matrix: SVD(*jnp.linalg.svd(matrix, full_matrices=False)))
_singular_values = one_by_one(lambda matrix: jnp.linalg.svd(matrix, compute_uv=False))
_eigh = one_by_one(lambda matrix: Eigh(*jnp.linalg.eigh(matrix)))
_eigenvalues = one_by_one(lambda matrix: jnp.linalg.eigvalsh(matrix))
_inverse = one_by_one(jnp.linalg.inv)


@jax.custom_jvp
def qr(matrix: Float[Array, "rows columns"]) -> QR:
    """The reduced QR decomposition."""
    return _qr(matrix)


@qr.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[QR, QR]:
    (matrix,), (tangent,) = primals, tangents
    if matrix.shape[0] < matrix.shape[1]:
        return jax.jvp(_qr, primals, tangents)
    with jax.default_matmul_precision("highest"):
        q, r = qr(matrix)
        change = tangent @ inverse(r)
        inside = q.T @ change
        # q^T dq is skew-symmetric, and dr r^-1 is upper triangular.
        turn = jnp.tril(inside, -1)
        turn = turn - turn.T
        return QR(q, r), QR(q @ (turn - inside) + change, (inside - turn) @ r)


@jax.custom_jvp
def inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The inverse of a matrix that has one."""
    return _inverse(matrix)


@inverse.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    result = inverse(*primals)
    with jax.default_matmul_precision("highest"):
        return result, -result @ tangents[0] @ result


def svd(matrix: Float[Array, "rows columns"]) -> SVD:
    """The reduced singular value decomposition."""
    return _svd(matrix)


def singular_values(matrix: Float[Array, "rows columns"]) -> Float[Array, " k"]:
    """The k = min(rows, columns) singular values, the largest first."""
    return _singular_values(matrix)


def eigh(matrix: Float[Array, "n n"]) -> Eigh:
    """Eigenvalues and eigenvectors of a symmetric matrix."""
    return _eigh(matrix)


def eigenvalues(matrix: Float[Array, "n n"]) -> Float[Array, " n"]:
    """Eigenvalues of a symmetric matrix, the smallest first."""
    return _eigenvalues(matrix)


def pinv(matrix: Float[Array, "rows columns"], rtol: float) -> Float[Array, "columns rows"]:
    """The pseudo-inverse, in which singular values of at most `rtol` times the largest count as zero."""
    with jax.default_matmul_precision("highest"):
        u, s, vt = svd(matrix)
        kept = s > rtol * s[0]
        return (vt.T * jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)[None, :]) @ u.T
