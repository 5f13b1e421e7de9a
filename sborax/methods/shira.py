"""SHiRA: Sparse High Rank Adapters, arXiv:2406.13175."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractAdditive,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    cast,
    check_rank,
)


@dataclasses.dataclass(frozen=True)
class SHiRA(AbstractAdditive):
    """y = x W + x S, where S is zero but for rank (in + out) trained entries at fixed places.

    rank: sets the number of entries, as many as a LoRA of this rank has (PEFT: 32).

    The places are drawn without replacement per kernel: entry n is at row idx[1, n], column idx[0, n] (PEFT's order).
    The step forms S: gathering the inputs of every entry would take rank (in + out) numbers per token.
    values = 0 at init: identity. Exact merge, and entries without a trained value keep their bits.
    Trained parameters: rank (in + out).
    """

    paper = "SHiRA: Rapid Switching and Multi-Adapter Fusion via Sparse High Rank Adapters, arXiv:2406.13175"
    group_b = frozenset({"values"})
    materialises = "entries at random places have no product of thin factors"

    rank: int = 32

    @property
    def axes(self) -> Axes:
        return {"values": (None,), "idx": (None, None)}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        entries, places = self.rank * sum(shape), shape[0] * shape[1]
        if entries > places:
            raise SboraxError(f"rank {self.rank} asks for {entries} entries of a weight that has {places}")
        if places > jnp.iinfo(jnp.int32).max:
            raise SboraxError(f"{places} places are more than an int32 index can name")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        entries = self.rank * (fan_in + fan_out)
        places = jnp.sort(jax.random.permutation(key, fan_in * fan_out)[:entries]).astype(jnp.int32)
        return Fitted({"values": jnp.zeros(entries)}, {"idx": jnp.stack([places % fan_out, places // fan_out])})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        columns, rows = adapter.frozen["idx"]

        # S is recomputed in the backward pass: saving one per layer would be a second model.
        @jax.checkpoint
        def sparse(x: Array, values: Array) -> Array:
            empty = jnp.zeros((x.shape[1], y.shape[1]), x.dtype)
            return x @ empty.at[rows, columns].set(cast(values, x), unique_indices=True)

        return y + sparse(x, adapter.train["values"])

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        columns, rows = adapter.frozen["idx"]
        return weight.at[rows, columns].add(adapter.train["values"], unique_indices=True)
