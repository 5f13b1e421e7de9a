"""Random projections that kernels of every size share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def shared_rows(key: Key[Array, ""], rows: int, width: int) -> Float[Array, "rows width"]:
    """The first `rows` rows of one endless random matrix, its entries uniform with mean 0 and variance 1.

    Row i depends on `key` and i alone, so kernels of all sizes get slices of the same matrix.
    """
    bound = 3.0**0.5

    def row(i: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, i), (width,), jnp.float32, -bound, bound)

    return jax.vmap(row)(jnp.arange(rows))
