"""QA-LoRA: quantisation-aware low-rank adaptation, arXiv:2309.14717."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    HIDDEN,
    AbstractFactored,
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
from sborax.methods.lowrank import PAIR_AXES, kaiming_uniform, pair_weight, scaling


@dataclasses.dataclass(frozen=True)
class QALoRA(AbstractFactored):
    """y = x W + s (p a) b, where p (tokens, in/group) sums groups of neighbouring inputs, a (in/group, rank).

    All rows of W in a group change by the same, so that the change fits into the zero points of a base that is
    quantised in such groups.

    rank: width of the factors, an int or a `RankPolicy`.
    alpha: s = alpha / rank; None (default) is s = 1.
    group: inputs of a group, which must divide in (PEFT: 16; the paper: that of the quantised base, 32).
    formula: "authors" (default), s as above, as in the paper's Algorithm 1; "peft", s in / group^2 instead, since PEFT
        multiplies the means of groups by their number and not by their size.
    dropout: rate on the adapter's input in training; default 0.

    a ~ U(-1/sqrt(in/group), 1/sqrt(in/group)), b = 0. Identity at init. Exact merge. Trained parameters:
    rank (in/group + out).
    """

    paper = "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models, arXiv:2309.14717"
    group_b = frozenset({"b"})
    ragged = True

    rank: Rank = 8
    alpha: float | None = hyper(None, above=0.0)
    group: int = 16
    formula: Literal["authors", "peft"] = hyper("authors")
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return PAIR_AXES

    def check(self, shape: tuple[int, int]) -> None:
        if self.group < 1 or shape[0] % self.group:
            raise SboraxError(f"group must divide {shape[0]} rows, got {self.group}")
        check_rank(self.rank, min(shape[0] // self.group, shape[1]), "the smaller side, of groups and of outputs")
        if self.formula not in ("authors", "peft"):
            raise SboraxError(f"formula must be 'authors' or 'peft', got {self.formula!r}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        groups = fan_in // self.group
        scale = scaling(self.alpha, self.rank, hint) * (groups / self.group if self.formula == "peft" else 1.0)
        train = {"a": kaiming_uniform(key, groups, self.rank, hint), "b": jnp.zeros((width(self.rank), fan_out))}
        return Fitted(train, {"scale": scale, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        grouped = dropout(x, adapter, ctx).reshape(x.shape[0], x.shape[1] // self.group, self.group)
        pooled = grouped.sum(axis=2)
        hidden = checkpoint_name(cast(adapter.frozen["scale"], x) * (pooled @ cast(adapter.train["a"], x)), HIDDEN)
        return y + hidden @ cast(adapter.train["b"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        change = pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])
        return weight + jnp.repeat(change, self.group, axis=0)

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        return jnp.repeat(adapter.frozen["scale"] * adapter.train["a"], self.group, axis=0), adapter.train["b"]
