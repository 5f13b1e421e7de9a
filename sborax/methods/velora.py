"""VeLoRA: memory-efficient training with rank-1 sub-token projections, arXiv:2405.17991."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    HIDDEN,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Rank,
    SboraxError,
    Weight,
    cast,
    check_rank,
    dropout,
    dropout_leaf,
    hyper,
    width,
)
from sborax.adapters.grouped import AbstractBranched, Sizes, grouped_dropout
from sborax.methods.lowrank import PAIR_AXES, kaiming_uniform, pair_weight, scaling
from sborax.methods.sub_tokens import grouped_product, product, sub_tokens, sums_by_expert, unit


@dataclasses.dataclass(frozen=True)
class VeLoRA(AbstractBranched):
    """y = x W + s (x a) b, as in LoRA, but the gradient of a is that of compressed inputs: x~ = gain (x_g . v) v.

    x_g (in/groups) is a sub-token, a part of x; in the last one zeros stand for what is missing. For the backward pass
    x_g . v is kept in place of x, groups numbers a token, and a gets the gradient x~^T dh. The function is LoRA's, and
    the gradients of x and b are exact.

    This saves memory only with `remat="none"`, and only where nothing else keeps x. With other values of `remat`, such
    as a run's default, layers recompute x, so VeLoRA saves nothing over LoRA (docs/methods.md).

    rank: width of the factors, an int or a `RankPolicy` (PEFT: 8).
    groups: parts of x (PEFT: 64).
    gain: factor of what is restored (PEFT: 1).
    direction: where the unit vector v comes from. "batch" (PEFT), the mean sub-token of each microbatch, or of each
        expert's rows (where rules choose layers or experts, of a tile of them): accumulated gradients are then not
        those of a batch as large. "fixed", a leaf, at random as PEFT's "random". The paper keeps the first batch's
        mean; files with PEFT's "batch_average_once" are read so.
        The leaf is there with "batch", too, since PEFT's files have it.
    alpha: s = alpha / rank; None (default) is s = 1.
    dropout: rate on the adapter's input in training; default 0.

    a and b start as in LoRA: identity at init. Exact merge W + s a b. Trained parameters: rank (in + out).
    """

    paper = "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections, arXiv:2405.17991"
    group_b = frozenset({"b"})
    ragged = True
    pair = True
    approximates = "inputs, in the gradient of a"
    sends = "the mean sub-token, and sub-tokens that devices share"

    rank: Rank = 8
    groups: int = 64
    gain: float = hyper(1.0, above=0.0)
    direction: Literal["batch", "fixed"] = "batch"
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def batch_gradient(self) -> str:
        return "the mean sub-token" if self.direction == "batch" else ""

    @property
    def axes(self) -> Axes:
        return {**PAIR_AXES, "v": (None,), "gain": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if not 1 <= self.groups <= shape[0]:
            raise SboraxError(f"groups must lie in 1..{shape[0]} (the inputs), got {self.groups}")
        if self.direction not in ("batch", "fixed"):
            raise SboraxError(f"direction must be 'batch' or 'fixed', got {self.direction!r}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        of_a, of_v = jax.random.split(key)
        size = -(-fan_in // self.groups)
        v = jnp.zeros(size) if self.direction == "batch" else unit(jax.random.normal(of_v, (size,)))
        train = {"a": kaiming_uniform(of_a, fan_in, self.rank, hint), "b": jnp.zeros((width(self.rank), fan_out))}
        frozen = {"v": v, "gain": jnp.float32(self.gain), "scale": scaling(self.alpha, self.rank, hint)}
        return Fitted(train, {**frozen, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        train, frozen = adapter.train, adapter.frozen
        x = dropout(x, adapter, ctx)
        v = frozen["v"]
        if self.direction == "batch":
            v = unit(jnp.mean(sub_tokens(jax.lax.stop_gradient(x), v.shape[-1]).astype(jnp.float32), axis=(0, 1)))
        hidden = product(x, cast(train["a"], x), v, frozen["gain"])
        return y + checkpoint_name(cast(frozen["scale"], x) * hidden, HIDDEN) @ cast(train["b"], x)

    def branch(
        self, x: Float[Array, "rows in"], sizes: Sizes, adapter: Adapter, ctx: Context
    ) -> tuple[Float[Array, "rows rank"], Float[Array, "experts rank out"]]:
        train, frozen = adapter.train, adapter.frozen
        x = grouped_dropout(x, sizes, adapter, ctx)
        v = frozen["v"]
        if self.direction == "batch":
            means = jnp.mean(sub_tokens(jax.lax.stop_gradient(x), v.shape[-1]), axis=1)
            v = jax.vmap(unit)(sums_by_expert(jnp.ones((x.shape[0], 1), x.dtype), means, sizes)[:, 0])
        hidden = grouped_product(x, cast(train["a"], x), v, frozen["gain"], sizes)
        return checkpoint_name(hidden, HIDDEN), cast(frozen["scale"][:, None, None] * train["b"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        return adapter.frozen["scale"] * adapter.train["a"], adapter.train["b"]
