"""SBoRA: Low-Rank Adaptation with Regional Weight Updates, arXiv:2407.05413."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from sborax.adapters.core import (
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
from sborax.adapters.experts import DISTINCT, AbstractExpert, check_block, index_block
from sborax.adapters.grouped import AbstractGrouped, grouped_dropout
from sborax.adapters.grouped_matmul import Sizes, add_columns, add_matmul, branch_columns, grouped_matmul
from sborax.methods.lowrank import scaling


@dataclasses.dataclass(frozen=True)
class SBoRA(AbstractExpert, AbstractGrouped):
    """One factor is a set of standard basis vectors, so only `rank` rows (FA) or columns (FB) of W ever move.

    FA: y = x W + s x[idx] b, b (rank, out), idx rows of W.    FB: (x W)[idx] += s x a, a (in, rank), idx columns.

    rank: how many rows or columns. alpha: s = alpha / rank; None (default) is s = 2, as in the authors' commands.
    variant: "FA" (default) or "FB". dropout: rate on x before the gather (authors' scripts 0.05; default 0).
    expert, experts, basis_seed: block `expert` of `experts` disjoint blocks of a permutation of all rows (columns).
        The permutation depends only on basis_seed and their number: experts trained apart do not interfere (ours).

    Without `expert`, idx is drawn without replacement per kernel as in the authors' code; sorting permutes b's rows.
    The trained factor starts at zero. Identity at init. Exact merge: W[idx, :] += s b, or W[:, idx] += s a.
    Trained parameters: rank out (FA), rank in (FB). The paper writes W (out, in): its columns are our rows.
    """

    paper = "SBoRA: Low-Rank Adaptation with Regional Weight Updates, arXiv:2407.05413"
    group_b = frozenset({"b"})

    rank: Rank = 64
    alpha: float | None = hyper(None, above=0.0)
    variant: Literal["FA", "FB"] = "FA"
    dropout: float = hyper(0.0)
    expert: int | None = hyper(None)
    experts: int = hyper(1)
    basis_seed: int = hyper(0)

    @property
    def axes(self) -> Axes:
        trained = {"b": ("rank", "out")} if self.variant == "FA" else {"a": ("in", "rank")}
        return {**trained, "idx": ("rank",), "scale": (), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        if self.variant not in ("FA", "FB"):
            raise SboraxError(f"variant must be 'FA' or 'FB', got {self.variant!r}")
        side = 0 if self.variant == "FA" else 1
        check_rank(self.rank, shape[side], ("rows of W", "columns of W")[side])
        check_block(self.expert, self.experts, width(self.rank), shape[side])

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        rank, (fan_in, fan_out), rows = width(self.rank), weight.shape, self.variant == "FA"
        trained = {"b": jnp.zeros((rank, fan_out))} if rows else {"a": jnp.zeros((fan_in, rank))}
        idx = index_block(key, fan_in if rows else fan_out, rank, self.expert, self.basis_seed)
        scale = jnp.float32(2.0) if self.alpha is None else scaling(self.alpha, self.rank, hint)
        return Fitted(trained, {"idx": idx, "scale": scale, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        x, idx, scale = dropout(x, adapter, ctx), adapter.frozen["idx"], cast(adapter.frozen["scale"], x)
        if self.variant == "FA":
            return y + (scale * x.at[:, idx].get(**DISTINCT)) @ cast(adapter.train["b"], x)
        return y.at[:, idx].add(scale * (x @ cast(adapter.train["a"], x)), **DISTINCT)

    def apply_grouped(
        self, x: Float[Array, "rows in"], weight: Weight, sizes: Sizes, adapter: Adapter, ctx: Context
    ) -> Float[Array, "rows out"]:
        idx, scale = adapter.frozen["idx"], cast(adapter.frozen["scale"], x)[:, None, None]
        if self.variant == "FA":
            x, columns = branch_columns(x, idx, sizes)
            b, y = scale * cast(adapter.train["b"], x), grouped_matmul(x, weight, sizes)
            # Each entry of x drops by itself, so those of the columns may do so after they are read.
            return add_matmul(y, grouped_dropout(columns, sizes, adapter, ctx), b, sizes)
        low = grouped_matmul(grouped_dropout(x, sizes, adapter, ctx), scale * cast(adapter.train["a"], x), sizes)
        return add_columns(grouped_matmul(x, weight, sizes), low, idx, sizes)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        idx, scale = adapter.frozen["idx"], adapter.frozen["scale"]
        place, factor = (idx, "b") if self.variant == "FA" else ((slice(None), idx), "a")
        return weight.at[place].add(scale * adapter.train[factor], **DISTINCT)

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        idx, scale = adapter.frozen["idx"], adapter.frozen["scale"]
        if self.variant == "FA":
            return jax.nn.one_hot(idx, shape[0], axis=0), scale * adapter.train["b"]
        return scale * adapter.train["a"], jax.nn.one_hot(idx, shape[1], axis=1)

    def overlaps(self, adapter: Adapter, other: Adapter) -> Bool[Array, ""]:
        assert isinstance(other.method, SBoRA)
        ours, theirs = adapter.frozen["idx"], other.frozen["idx"]
        return jnp.logical_or(self.variant != other.method.variant, jnp.any(ours[..., :, None] == theirs[..., None, :]))
