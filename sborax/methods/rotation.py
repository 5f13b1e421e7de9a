"""Rotations by Cayley's transform of skew-symmetric matrices."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.linalg import inverse


def rotations(q: Float[Array, "blocks upper"], size: int, terms: int | None) -> Float[Array, "blocks size size"]:
    """(I - Q)(I + Q)^-1 of every block, or the series of its inverse: I + 2 Q + ... + 2 Q^(t-2) + Q^(t-1), t terms.

    Args:
    - q: the entries of Q above the diagonal, row by row.
    - size: of Q.
    - terms: length of the series, at least 4, or 2 for I + 2 Q; None for the exact rotation.
    """
    rows, columns = np.triu_indices(size, 1)
    upper = jnp.zeros((q.shape[0], size, size)).at[:, rows, columns].set(q)
    return cayley(upper - upper.transpose(0, 2, 1), terms)


def cayley(skew: Float[Array, "blocks size size"], terms: int | None) -> Float[Array, "blocks size size"]:
    """The rotations of `rotations`, from the skew-symmetric matrices Q."""
    eye = jnp.eye(skew.shape[-1])[None]
    if terms is None:
        # (I - Q)(I + Q)^-1, since I - Q = 2 I - (I + Q).
        return 2.0 * jax.vmap(inverse)(eye + skew) - eye
    if terms == 2:
        return eye + 2.0 * skew
    r, power = eye, skew
    for _ in range(terms - 2):
        r, power = r + 2.0 * power, jnp.matmul(power, skew, precision="highest")
    return r + power
