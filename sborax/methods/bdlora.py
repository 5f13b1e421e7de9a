"""BD-LoRA: block-diagonal LoRA for tensor-parallel serving, arXiv:2510.23346."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.constraints import ROWS, cut
from sborax.adapters.core import (
    HIDDEN,
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
from sborax.methods.lowrank import kaiming_uniform, pair_weight, scaling


@dataclasses.dataclass(frozen=True)
class BDLoRA(AbstractFactored):
    """y = x W + s (x a) b, where b, or else a, is block-diagonal: each device that serves a projection has some blocks.

    side: "out", y_n += s (x a_n) b_n for each part y_n of the outputs, with a_n (in, rank/blocks) and b_n
        (rank/blocks, out/blocks), for projections whose outputs are cut over devices: q, k, v, gate and up (PEFT's
        `target_modules_bd_b`). "in", y += s (x_n a_n) b_n for each part x_n of the inputs, with a_n
        (in/blocks, rank/blocks) and b_n (rank/blocks, out), where inputs are cut: o and down (`target_modules_bd_a`).
    rank: width of both factors, a multiple of blocks (PEFT: 8).
    blocks: how many blocks. The number must divide that side, and the tensor axis of a mesh must divide the number. The
        paper takes the number of devices that serve the model, at most 8 (default). PEFT's default 1 is plain LoRA.
    alpha: s = alpha / rank; None (default) is s = 1.
    dropout: rate on the adapter's input in training; default 0.

    a as PEFT draws it: U(-1/sqrt(in), 1/sqrt(in)) for "out", U(-sqrt(6 blocks/in), sqrt(6 blocks/in)) for "in". b = 0:
    identity at init. Exact merge. Trained parameters: rank (in + out/blocks) for "out", rank (in/blocks + out) for
    "in". The block-diagonal factor is called a_i or b_i. Its blocks lie along the tensor axis; all devices of that axis
    have the other factor. In the paper's serving nothing is sent; here a step gathers rank floats a token.
    """

    paper = (
        "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving, arXiv:2510.23346"
    )
    group_b = frozenset({"b", "b_i"})
    sends = "the thin values, which are gathered"

    rank: int = 8
    side: Literal["in", "out"] = "out"
    blocks: int = 8
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        if self.side == "out":
            factors = {"a": (None, "in", None), "b_i": ("out", None, None)}
        else:
            factors = {"a_i": ("in", None, None), "b": (None, None, "out")}
        return {**factors, "scale": (), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        if self.side not in ("in", "out"):
            raise SboraxError(f"side must be 'in' or 'out', got {self.side!r}")
        check_rank(self.rank, min(shape), "the smaller side")
        cut = shape[0] if self.side == "in" else shape[1]
        if self.blocks < 1 or self.rank % self.blocks or cut % self.blocks:
            raise SboraxError(f"blocks must divide the rank {self.rank} and {cut} {self.side}puts, got {self.blocks}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        parts, thin = self.blocks, self.rank // self.blocks
        if self.side == "out":
            a = kaiming_uniform(key, fan_in, self.rank, hint).reshape(fan_in, parts, thin).swapaxes(0, 1)
            train = {"a": a, "b_i": jnp.zeros((parts, thin, fan_out // parts))}
        else:
            bound = math.sqrt(6 * parts / fan_in)
            a = jax.random.uniform(key, (parts, fan_in // parts, thin), jnp.float32, -bound, bound)
            train = {"a_i": a, "b": jnp.zeros((parts, thin, fan_out))}
        return Fitted(train, {"scale": scaling(self.alpha, self.rank, hint), **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        inputs, train = dropout(x, adapter, ctx), adapter.train
        scale = cast(adapter.frozen["scale"], x)
        if self.side == "out":
            hidden = self._thin(scale * jnp.einsum("ti,nir->tnr", inputs, cast(train["a"], x)))
            return y + jnp.einsum("tnr,nro->tno", hidden, cast(train["b_i"], x)).reshape(y.shape)
        parts = inputs.reshape(x.shape[0], self.blocks, x.shape[1] // self.blocks)
        hidden = self._thin(scale * jnp.einsum("tni,nir->tnr", parts, cast(train["a_i"], x)))
        return y + jnp.einsum("tnr,nro->to", hidden, cast(train["b"], x))

    def _thin(self, hidden: Float[Array, "tokens blocks thin"]) -> Float[Array, "tokens blocks thin"]:
        """On every device that shares the projection: the compiler would send a second sum of all outputs instead."""
        return cut(checkpoint_name(hidden, HIDDEN), ROWS, None, None)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        a, b = self.factors(adapter, (weight.shape[0], weight.shape[1]))
        return weight + pair_weight(a, b, jnp.float32(1.0))

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        """With the zeros between blocks."""
        train, scale = adapter.train, adapter.frozen["scale"]
        if self.side == "out":
            a = train["a"].swapaxes(0, 1).reshape(shape[0], self.rank)
            return scale * a, _diagonal(train["b_i"])
        return scale * _diagonal(train["a_i"]), train["b"].reshape(self.rank, shape[1])


def _diagonal(blocks: Float[Array, "blocks rows columns"]) -> Float[Array, "all_rows all_columns"]:
    """The block-diagonal matrix."""
    parts, rows, columns = blocks.shape
    identity = jnp.eye(parts)[:, None, :, None]
    return (blocks[:, :, None, :] * identity).reshape(parts * rows, parts * columns)
