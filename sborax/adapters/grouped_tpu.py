"""Products of rows that are sorted by expert on a TPU, by the megablox kernels of JAX.

`jax.lax.ragged_dot` would multiply every row by the weight of every expert, on a TPU as elsewhere.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ROWS, WIDE, NARROW = 512, 1024, 512
"""Sides of the kernels' tiles: rows, and features of 2 bytes or of 4, so that the tiles of a product fit in VMEM."""
SUBLANES = 16
"""Tiles have a multiple of so many rows."""


def product(
    x: Float[Array, "rows in"],
    weight: Float[Array, "experts _ _"],
    sizes: Int[Array, " experts"],
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "rows out"]:
    """Each row times the weight of its expert, or times its transpose.

    - sizes: how many rows each expert has. Rows beyond their sum are undefined.
    - interpret: run the kernel on a CPU, slowly.
    """
    gmm, _ = _kernels()
    sides = weight.shape[:0:-1] if transposed else weight.shape[1:]
    padded, tiling = _tiled(x, *sides)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        y = gmm(padded, weight, sizes, x.dtype, tiling, transpose_rhs=transposed, interpret=interpret)
    return y[: x.shape[0]]


def outer(
    x: Float[Array, "rows in"], g: Float[Array, "rows out"], sizes: Int[Array, " experts"], interpret: bool = False
) -> Float[Array, "experts fan_in fan_out"]:
    """x^T g over the rows of each expert, float32. Arguments are those of `product`."""
    _, tgmm = _kernels()
    padded, tiling = _tiled(x, x.shape[1], g.shape[1])
    grads = jnp.pad(g, ((0, padded.shape[0] - x.shape[0]), (0, 0)))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return tgmm(padded.T, grads, sizes, jnp.float32, tiling, interpret=interpret)


@functools.cache
def _kernels():
    # Pallas takes a second to import, which only models with experts need.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

    return gmm, tgmm


def _tiled(
    x: Float[Array, "rows in"], fan_in: int, fan_out: int
) -> tuple[Float[Array, "padded in"], tuple[int, int, int]]:
    """The rows filled up to whole tiles, and the tiles' sides."""
    rows = min(ROWS, -(-x.shape[0] // SUBLANES) * SUBLANES)
    side = WIDE if x.dtype.itemsize <= 2 else NARROW
    padded = jnp.pad(x, ((0, -x.shape[0] % rows), (0, 0)))
    return padded, (rows, min(side, fan_in), min(side, fan_out))
