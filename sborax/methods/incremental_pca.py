"""Principal components of rows that come in batch by batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sborax.methods.lowrank import principal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The principal components of the rows seen so far.

    - components: of unit length, by falling singular value.
    - singular: singular values of the rows less their mean.
    - mean, spread: the mean of the rows, and the sum of the squares of their distances from it.
    - seen: how many rows.
    - turned: the cosine between each component and the one before the last batch.
    """

    components: Float[Array, "n features"]
    singular: Float[Array, " n"]
    mean: Float[Array, " features"]
    spread: Float[Array, ""]
    seen: Float[Array, ""]
    turned: Float[Array, " n"]

    @property
    def shares(self) -> Float[Array, " n"]:
        """The share of the variance that each component explains."""
        return self.singular**2 / jnp.maximum(self.spread, 1e-30)


def empty(count: int, features: int) -> Spectrum:
    """`count` components before the first row."""
    zero, zeros = jnp.zeros(()), jnp.zeros(count)
    return Spectrum(jnp.zeros((count, features)), zeros, jnp.zeros(features), zero, zero, zeros)


@functools.partial(jax.jit, static_argnames="niter")
def updated(
    old: Spectrum, x: Float[Array, "rows features"], mask: Float[Array, " rows"], niter: int | None
) -> Spectrum:
    """The components of the rows so far and of the rows of `x` whose `mask` is 1, not 0.

    Leading components times singular values stand for the earlier rows (Ross et al. 2008).

    - niter: None for an exact decomposition, else subspace iterations of a randomised one of twice the width.
    """
    with jax.default_matmul_precision("highest"):
        count, new = old.components.shape[0], jnp.sum(mask)
        mean = mask @ x / new
        centred = (x - mean[None]) * mask[:, None]
        total = old.seen + new
        between = jnp.sqrt(old.seen * new / total) * (old.mean - mean)
        rows = jnp.concatenate([old.singular[:, None] * old.components, centred, between[None]])
        _, singular, components = principal(jax.random.key(42), rows, min(2 * count, *rows.shape), niter)
        components, singular = components[:count], singular[:count]
        # The largest entry is made positive, so that a mere change of sign is not taken for a turn.
        largest = jnp.argmax(jnp.abs(components), axis=1, keepdims=True)
        components = components * jnp.sign(jnp.take_along_axis(components, largest, axis=1))
        lengths = jnp.linalg.norm(components, axis=1) * jnp.linalg.norm(old.components, axis=1)
        return Spectrum(
            components,
            singular,
            (old.seen * old.mean + new * mean) / total,
            old.spread + jnp.sum(centred**2) + jnp.sum(between**2),
            total,
            jnp.sum(components * old.components, axis=1) / jnp.maximum(lengths, 1e-8),
        )
