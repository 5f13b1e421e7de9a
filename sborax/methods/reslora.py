"""ResLoRA: Identity Residual Mapping in Low-Rank Adaption, arXiv:2402.18039."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
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
    dropout,
    dropout_leaf,
    hyper,
    signed,
)
from sborax.adapters.depth import AbstractLinked, Memory
from sborax.methods.lora import lora_of
from sborax.methods.lowrank import HIDDEN, PAIR_AXES, kaiming_uniform, pair_weight, scaling


@dataclasses.dataclass(frozen=True)
class ResLoRA(AbstractAdditive, AbstractLinked):
    """LoRA with shortcuts between the layers n of one projection. The option `shortcut` is one of

    "block":  y_n = x_n W_n + s x_n sum_k a_{n-k} b_{n-k}, k = 0..m: merges exactly (default),
    "input":  y_n = x_n W_n + s (x_n + x_{n-1}) a_n b_n, with x_{-1} = x_0: merges approximately,
    "middle": y_n = x_n W_n + s (sum_k x_{n-k} a_{n-k}) b_n, k = 0..m: merges approximately.

    rank: width of the factors (authors: 4), the same in all layers.
    pre_num: how many previous layers, m = min(pre_num, those there are); -1 (default): all. "input" reaches one layer
        back whatever it is. 0: plain LoRA.
    alpha: s = alpha / rank; None (default) is s = 1 (authors: 8 or 16). dropout: on what a multiplies (authors: 0.1).

    After a layer that the rule leaves out, a new chain begins. A layer that is called alone is the first of a chain.
    `LanguageModel` and `merge` link the layers. In a model of your own, `link` the adapters, and pass what
    `sborax.adapters.depth.remember` returns to the next layer in `Context.memory`. Approximate merges are in
    `sborax.interop.reslora`.
    a ~ U(-1/sqrt(in), 1/sqrt(in)), b = 0: identity at init. Trained parameters: rank (in + out).
    """

    paper = "ResLoRA: Identity Residual Mapping in Low-Rank Adaption, arXiv:2402.18039"
    group_b = frozenset({"b"})

    rank: int = 4
    shortcut: Literal["block", "input", "middle"] = "block"
    pre_num: int = signed(-1)
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def linked(self) -> bool:
        return self.pre_num != 0

    @property
    def no_merge(self) -> str:
        if self.shortcut == "block" or not self.linked:
            return ""
        return "a layer reads values of earlier ones; approximate it: `sborax merge --approximate`, interop.reslora"

    @property
    def axes(self) -> Axes:
        return PAIR_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.shortcut not in ("block", "input", "middle") or self.pre_num < -1:
            raise SboraxError(
                f"needs shortcut 'block', 'input' or 'middle' and pre_num >= -1, got {self.shortcut!r}, {self.pre_num}"
            )

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        a = kaiming_uniform(key, weight.shape[0], self.rank, hint)
        scale = scaling(self.alpha, self.rank, hint)
        return Fitted(
            {"a": a, "b": jnp.zeros((self.rank, weight.shape[1]))}, {"scale": scale, **dropout_leaf(self.dropout)}
        )

    def link(self, adapter: Adapter, earlier: tuple[int, ...]) -> Adapter:
        if self.shortcut != "block":
            return adapter
        most = max(earlier) if self.pre_num == -1 else min(self.pre_num, max(earlier))
        reached = [jnp.asarray(earlier)[:, None, None] >= k for k in range(most + 1)]

        def window(leaf: Float[Array, "layers m n"], axis: int) -> Float[Array, "layers m2 n2"]:
            return jnp.concatenate([jnp.where(to, jnp.roll(leaf, k, 0), 0) for k, to in enumerate(reached)], axis)

        a = window(adapter.frozen["scale"][:, None, None] * adapter.train["a"], -1)
        return lora_of(a, window(adapter.train["b"], -2), adapter)

    def remember(self, x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context) -> Memory:
        if self.shortcut == "block" or not self.linked:
            return {}
        if self.shortcut == "input":
            return {"input": x, "linked": jnp.ones(x.shape[:1], x.dtype)}
        hidden = _hidden(x, adapter, ctx)[:, None]
        history = ctx.memory.get("hidden", jnp.zeros((len(x), 2 if self.pre_num == -1 else self.pre_num, self.rank)))
        # Newest first. If all layers are in reach, the older ones are one sum.
        older = history.sum(1, keepdims=True) if self.pre_num == -1 else history[:, :-1]
        return {"hidden": jnp.concatenate([hidden, cast(older, x)], axis=1)}

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        if self.shortcut == "input" and self.linked:
            memory = {"linked": jnp.zeros(x.shape[:1]), "input": x, **ctx.memory}
            x = x + jnp.where(memory["linked"][:, None] != 0, memory["input"], x)
        hidden = _hidden(x, adapter, ctx)
        if self.shortcut == "middle" and self.linked and "hidden" in ctx.memory:
            hidden = hidden + ctx.memory["hidden"].sum(1)
        hidden = checkpoint_name(cast(adapter.frozen["scale"], x) * hidden, HIDDEN)
        return y + hidden @ cast(adapter.train["b"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        if self.no_merge:
            raise SboraxError(f"ResLoRA cannot be merged: {self.no_merge}")
        return weight + pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])


def _hidden(x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context) -> Float[Array, "tokens rank"]:
    return dropout(x, adapter, ctx) @ cast(adapter.train["a"], x)
