"""Super-Tuning: training the largest entries of a weight, arXiv:2607.09287."""

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
    dense,
    dropout_leaf,
    hyper,
)
from sborax.methods.lowrank import PAIR_AXES, kaiming_uniform, pair_delta, pair_weight


@dataclasses.dataclass(frozen=True)
class SuperTuning(AbstractAdditive):
    """y = x W + x S + s (x a) b, where S is zero but for trained entries at the largest entries of W.

    sparsity: share of the entries that are not trained: int((1 - sparsity) in out) are (PEFT: 0.99).
    largest: whether entries of W of largest magnitude are trained, or of smallest (default True, as PEFT).
    lora_rank: width of a and b, the hybrid "Supra"; 0 for none (default, as PEFT).
    alpha: s = alpha / lora_rank; None (default) is s = 2, as PEFT.
    dropout: rate on the input of a; default 0.

    Entry n is at row idx[n] % in, column idx[n] // in (PEFT's order). The step forms S. S and b are 0 at
    init: identity. Exact merge, and entries without a trained value keep their bits.
    Trained parameters: int((1 - sparsity) in out) + lora_rank (in + out).
    """

    paper = "Super-Tuning, arXiv:2607.09287"
    group_b = frozenset({"values", "b"})
    materialises = "entries at scattered places have no product of thin factors"
    rank = 1

    sparsity: float = 0.99
    largest: bool = True
    lora_rank: int = 0
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {"values": (None,), "idx": (None,), **PAIR_AXES}

    @property
    def summed(self) -> int:
        return self.lora_rank

    def check(self, shape: tuple[int, int]) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise SboraxError(f"sparsity must lie in [0, 1), got {self.sparsity}")
        if self._entries(shape) < 1:
            raise SboraxError(f"sparsity {self.sparsity} leaves nothing to train of {shape[0] * shape[1]} entries")
        if shape[0] * shape[1] > jnp.iinfo(jnp.int32).max:
            raise SboraxError(f"{shape[0] * shape[1]} places are more than an int32 index can name")
        if self.lora_rank:
            check_rank(self.lora_rank, min(shape), "the smaller side")
        elif self.alpha is not None or self.dropout:
            raise SboraxError("alpha and dropout are of a and b, which lora_rank=0 leaves out; give lora_rank")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        sizes = jnp.abs(dense(weight).astype(jnp.float32)).T.reshape(-1)
        _, places = jax.lax.top_k(sizes if self.largest else -sizes, self._entries(weight.shape))
        train, frozen = {"values": jnp.zeros(places.shape)}, {"idx": jnp.sort(places).astype(jnp.int32)}
        if self.lora_rank:
            a = kaiming_uniform(key, fan_in, self.lora_rank, hint)
            scale = jnp.float32(2.0 if self.alpha is None else self.alpha / self.lora_rank)
            train |= {"a": a, "b": jnp.zeros((self.lora_rank, fan_out))}
            frozen |= {"scale": scale, **dropout_leaf(self.dropout)}
        return Fitted(train, frozen)

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        columns, rows = jnp.divmod(adapter.frozen["idx"], jnp.int32(x.shape[1]))

        # S is recomputed in the backward pass: saving one per layer would be a second model.
        @jax.checkpoint
        def sparse(x: Array, values: Array) -> Array:
            empty = jnp.zeros((x.shape[1], y.shape[1]), x.dtype)
            return x @ empty.at[rows, columns].set(cast(values, x), unique_indices=True)

        y = y + sparse(x, adapter.train["values"])
        return y + pair_delta(x, adapter, ctx) if self.lora_rank else y

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        columns, rows = jnp.divmod(adapter.frozen["idx"], jnp.int32(weight.shape[0]))
        train = adapter.train
        if self.lora_rank:
            weight = weight + pair_weight(train["a"], train["b"], adapter.frozen["scale"])
        return weight.at[rows, columns].add(train["values"], unique_indices=True)

    def _entries(self, shape: tuple[int, ...]) -> int:
        return int(shape[0] * shape[1] * (1 - self.sparsity))
