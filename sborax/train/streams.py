"""The random streams of a run."""

import dataclasses

import jax
from jaxtyping import Array, Key


@dataclasses.dataclass(frozen=True)
class Streams:
    """Keys of one seed: for initial adapters, for dropout, and for what the procedure draws between steps."""

    adapters: Key[Array, ""]
    dropout: Key[Array, ""]
    procedure: Key[Array, ""]

    @classmethod
    def of(cls, seed: int) -> "Streams":
        """The streams of a `seed_adapter`."""
        key = jax.random.key(seed)
        return cls(key, jax.random.fold_in(key, 1), jax.random.fold_in(key, 2))
