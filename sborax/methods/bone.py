"""Bone, later MiSS: one shared shard added to every shard of the weight, arXiv:2409.15371 (v4 and later)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.constraints import sharing
from sborax.adapters.core import (
    AbstractFactored,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    cast,
    check_rank,
    dropout,
    dropout_leaf,
    hyper,
)
from sborax.adapters.grouped import AbstractGrouped, grouped_dropout
from sborax.adapters.grouped_matmul import Sizes, add_matmul, grouped_matmul
from sborax.methods.lowrank import HIDDEN


@dataclasses.dataclass(frozen=True)
class Bone(AbstractFactored, AbstractGrouped):
    """y = x W + S(x) d, d (rank, out), where S sums the inputs that share a row of d.

    grouping="strided" (default, PEFT's MISS): S(x)[j] = sum_m x[m rank + j], so W'[i, :] = W[i, :] + d[i mod rank, :].
    grouping="contiguous" (the paper's prose): groups of g = ceil(in / rank) neighbours share, row i gets d[i // g, :].

    rank: rows of d. Not comparable to LoRA's rank: at equal parameters it is about twice that (authors: 64).
    mini_rank: if given, d is (rank, mini_rank) and repeats along out (PEFT "mini"); it must divide out.
    dropout: rate on x; default 0.

    There is no alpha: the scale is 1. d = 0 at init: identity. Exact merge. An input whose size is no multiple of
    rank is padded with zeros. Trained parameters: rank out, or rank mini_rank.
    """

    paper = (
        "Bone / MiSS: Revisiting the Trade-off in Low-Rank Adaptation with Efficient Shard Sharing, arXiv:2409.15371"
    )

    rank: int = 64
    grouping: Literal["strided", "contiguous"] = "strided"
    mini_rank: int | None = None
    dropout: float = hyper(0.0)

    @property
    def sends(self) -> str:
        return "" if self.mini_rank is None else "mini_rank more floats a token, for d is on every device"

    @property
    def axes(self) -> Axes:
        return {"d": ("rank", "out" if self.mini_rank is None else None), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, shape[0], "rows of W")
        if self.grouping not in ("strided", "contiguous"):
            raise SboraxError(f"grouping must be 'strided' or 'contiguous', got {self.grouping!r}")
        count = -(-shape[0] // -(-shape[0] // self.rank))
        if self.grouping == "contiguous" and count < self.rank:
            raise SboraxError(
                f"rank {self.rank} cuts {shape[0]} inputs into {count} groups, and a row without a group never trains; "
                f"use rank {count}"
            )
        if self.mini_rank is not None and (self.mini_rank < 1 or shape[1] % self.mini_rank):
            raise SboraxError(f"mini_rank must divide {shape[1]} columns, got {self.mini_rank}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        return Fitted({"d": jnp.zeros((self.rank, self.mini_rank or weight.shape[1]))}, dropout_leaf(self.dropout))

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        pooled = checkpoint_name(self._pooled(dropout(x, adapter, ctx)), HIDDEN)
        low = pooled @ cast(adapter.train["d"], x)
        return y + (low if self.mini_rank is None else jnp.tile(low, (1, y.shape[1] // self.mini_rank)))

    def apply_grouped(
        self, x: Float[Array, "rows in"], weight: Weight, sizes: Sizes, adapter: Adapter, ctx: Context
    ) -> Float[Array, "rows out"]:
        # S is the same for all experts, so its sums need no product by expert.
        pooled = checkpoint_name(self._pooled(grouped_dropout(x, sizes, adapter, ctx)), HIDDEN)
        y, d = grouped_matmul(x, weight, sizes), cast(adapter.train["d"], x)
        if self.mini_rank is None:
            return add_matmul(y, pooled, d, sizes)
        return y + jnp.tile(grouped_matmul(pooled, d, sizes), (1, y.shape[1] // self.mini_rank))

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        fan_in, fan_out = weight.shape
        return weight + self._rows(adapter, fan_out)[_row_of(self.rank, self.grouping, fan_in)]

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        summing = jax.nn.one_hot(_row_of(self.rank, self.grouping, shape[0]), self.rank)
        return summing, self._rows(adapter, shape[1])

    def _pooled(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens rank"]:
        """S(x)."""
        fan_in, rank, devices = x.shape[1], self.rank, sharing()
        if devices > 1 and (self.grouping == "contiguous" or fan_in % (rank * devices)):
            # Groups span devices. A sum over reshaped x would gather x; a product with a 0/1 matrix is cut as x is.
            return x @ jax.nn.one_hot(_row_of(rank, self.grouping, fan_in), rank, dtype=x.dtype)
        shards = -(-fan_in // rank)
        padded = jnp.pad(x, ((0, 0), (0, shards * rank - fan_in)))
        if self.grouping == "strided":
            return padded.reshape(-1, shards, rank).sum(axis=1)
        return padded.reshape(-1, rank, shards).sum(axis=2)

    def _rows(self, adapter: Adapter, fan_out: int) -> Float[Array, "rank out"]:
        d = adapter.train["d"]
        return jnp.tile(d, (1, fan_out // d.shape[1]))


def _row_of(rank: int, grouping: str, fan_in: int):
    """Which row of d input i shares."""
    i = jnp.arange(fan_in)
    return i % rank if grouping == "strided" else i // -(-fan_in // rank)
