"""The random streams of a run."""

import dataclasses

import jax
from jaxtyping import Array, Key


@dataclasses.dataclass(frozen=True)
class Streams:
    """Keys of one seed, by what draws from them: initial adapters, dropout, and the procedure between steps."""

    adapters: Key[Array, ""]
    dropout: Key[Array, ""]
    procedure: Key[Array, ""]

    @classmethod
    def of(cls, seed: int) -> "Streams":
        """The streams of `seed_adapter`."""
        key = jax.random.key(seed)
        return cls(key, jax.random.fold_in(key, 1), jax.random.fold_in(key, 2))
