"""Lily: low-rank interconnected adaptation across layers, arXiv:2407.09946."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.bank import AbstractBank, AbstractBanked, bank_leaf
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
    hyper,
)
from sborax.methods.lily_experts import LilyExperts
from sborax.methods.lowrank import HIDDEN


@dataclasses.dataclass(frozen=True)
class Lily(AbstractAdditive, AbstractBanked):
    """y = x W + s sum_e g_e (x a) b_e, g = softmax((x a) router): experts b_e that all layers share, mixed by a router.

    Kernels of a kind, such as the q_proj of all layers, share the experts; `stride` neighbouring layers share a.

    rank: width of a (PEFT: 32). stride: layers that share a (PEFT: 1). experts: of each kind (PEFT: 2).
    routing: "token" (default): each token has its own g. "batch": all share its mean over the batch without padding.
    scale: s (PEFT: 1).

    The authors' code and PEFT take the mean over the batch, padding included. So a text's output depends on the other
    texts, on its own later tokens and on the size of microbatches, and in generation g comes from the new token only.
    With "token", g depends on no other token. PEFT's files are read and written with "batch", which gives the same
    outputs where nothing is padded.
    a ~ U(-1/sqrt(in), 1/sqrt(in)), router ~ U(-1/sqrt(rank), 1/sqrt(rank)), b = 0. Identity at init. No merge.
    Trained parameters: rank experts for each weight, and for each kind rank (in ceil(layers / stride) + out experts).
    """

    paper = "Low-Rank Interconnected Adaptation across Layers, arXiv:2407.09946"
    no_merge = "its router mixes experts anew for every token"
    sends = "the experts and the shared factor of each kind, and their gradients"
    bank_name = "lily"
    bank_leaves = frozenset({"a", "b"})
    bank_of_kind = True

    rank: int = 32
    stride: int = 1
    experts: int = 2
    routing: Literal["token", "batch"] = "token"
    scale: float = hyper(1.0, above=0.0)

    @property
    def axes(self) -> Axes:
        return {"a": ("in", "rank"), "b": (None, "out"), "router": ("rank", None), "scale": ()}

    @property
    def token_mean(self) -> bool:
        return self.routing == "batch"

    @property
    def bank_entries(self) -> Mapping[str, int]:  # type: ignore[override]
        return {"a": self.stride}

    def bank(self, shape: tuple[int, int], readers: int) -> AbstractBank:
        return LilyExperts(*shape, self.rank, math.ceil(readers / self.stride), self.experts)

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.stride < 1 or self.experts < 2:
            raise SboraxError(f"needs stride >= 1 and experts >= 2, got {self.stride} and {self.experts}")
        if self.routing not in ("token", "batch"):
            raise SboraxError(f"routing must be 'token' or 'batch', got {self.routing!r}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        bound = 1.0 / math.sqrt(self.rank)
        router = jax.random.uniform(key, (self.rank, self.experts), minval=-bound, maxval=bound)
        return Fitted({"router": router}, {"scale": jnp.float32(self.scale)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        hidden = checkpoint_name(x @ cast(bank_leaf(adapter, "a"), x), HIDDEN)
        gates = jax.nn.softmax(hidden.astype(jnp.float32) @ adapter.train["router"], axis=-1)
        if self.routing == "batch":
            real = jnp.ones(x.shape[0]) if ctx.mask is None else (ctx.mask != 0).astype(jnp.float32)
            gates = jnp.broadcast_to(real @ gates / jnp.maximum(jnp.sum(real), 1.0), gates.shape)
        gates = cast(adapter.frozen["scale"] * gates, x)
        mixed = (gates[:, :, None] * hidden[:, None, :]).reshape(x.shape[0], self.experts * hidden.shape[1])
        return y + mixed @ cast(bank_leaf(adapter, "b"), x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        raise SboraxError(f"Lily cannot be merged: {self.no_merge}")
