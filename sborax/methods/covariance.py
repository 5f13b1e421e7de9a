"""Covariances of the inputs of weights."""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sborax.adapters.informed import Inputs, Place
from sborax.adapters.linalg import inverse


def covariances(
    places: Iterable[Place], batches: Sequence[Callable[[], Inputs]]
) -> dict[Place, Float[np.ndarray, "in in"]]:
    """For each weight the mean over samples of X^T X / max(X)^2, X the inputs of a sample without padding."""
    sums: dict[Place, np.ndarray] = {}
    samples, places = 0, list(places)
    for batch in batches:
        inputs = batch()
        samples += int(inputs.real.any(axis=1).sum())
        for path, position in places:
            part = np.asarray(_summed(inputs.rows[path][position], inputs.real))
            sums[path, position] = sums.get((path, position), 0) + part
    return {place: total / np.float32(samples) for place, total in sums.items()}


@jax.jit
def _summed(rows: Float[Array, "batch seq in"], real: Bool[Array, "batch seq"]) -> Float[Array, "in in"]:
    present = jnp.asarray(real)[:, :, None]
    x = jnp.where(present, rows.astype(jnp.float32), 0.0)
    most = jnp.max(jnp.where(present, x, -jnp.inf), axis=(1, 2), keepdims=True)
    x = jnp.where(jnp.isfinite(most), x / jnp.abs(most), 0.0).reshape(-1, x.shape[-1])
    return jnp.matmul(x.T, x, precision="highest")


def invertible(c: Float[Array, "in in"]) -> tuple[Float[Array, "in in"], Float[Array, "in in"]]:
    """C with a multiple of I added that lets it be inverted in float32, and its inverse.

    C + d mean(diag C) I, d = 0.01, doubled until |C C^-1 - I| < 0.05.
    """
    identity = jnp.eye(len(c))

    def damped(damp: Array) -> tuple[Array, Array, Array]:
        full = c + damp * jnp.mean(jnp.diag(c)) * identity
        return damp, full, inverse(full)

    def wrong(state: tuple[Array, Array, Array]) -> Array:
        damp, full, inverted = state
        error = jnp.linalg.norm(jnp.matmul(full, inverted, precision="highest") - identity)
        return (error >= 0.05) & (damp < 1e6)

    _, full, inverted = jax.lax.while_loop(wrong, lambda state: damped(2 * state[0]), damped(jnp.float32(0.01)))
    return full, inverted
