"""DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractReparametrisation,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Leaves,
    Weight,
    cast,
    check_rank,
    dense,
    dropout,
    dropout_leaf,
    hyper,
    in_float32,
    matmul,
)
from sborax.adapters.depth import over_stack
from sborax.adapters.grouped import AbstractGrouped, grouped_dropout, row_factors
from sborax.adapters.grouped_matmul import Sizes, add_matmul, branch_matmul, grouped_matmul
from sborax.methods.lowrank import HIDDEN, PAIR_AXES, kaiming_uniform, pair_weight, scaling

SMALLEST = 1e-2
"""Lower bound on a column's norm, relative to the base column's: float32 knows squares to 1e-7 of the base's."""


@dataclasses.dataclass(frozen=True)
class DoRA(AbstractReparametrisation, AbstractGrouped):
    """W' = m * (W + s a b) / ||W + s a b||, the norm of each output column taken over the input axis.

    y = (m / n) * (x W + s (x a) b), n = ||W + s a b|| held constant in the backward pass (paper, section 4.3).
    n^2 = |w_j|^2 + 2 s w_j . (a b_j) + s^2 b_j^T (a^T a) b_j, so the weight is never formed in a step.

    rank: width of the factors.
    alpha: s = alpha / rank; None (default) is s = 1.
    dropout: rate on x in the low-rank branch and in the rescaling of the base, not in the base term itself, as PEFT.

    Norms below 1 % of |w_j| count as 1 % of |w_j|, since float32 cannot tell them from zero here.
    a ~ U(-1/sqrt(in), 1/sqrt(in)), b = 0, m = ||W||. Identity at init. Exact merge. Bias is not rescaled.
    Trained parameters: rank (in + out) + out.
    """

    paper = "DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353"
    group_b = frozenset({"b", "m"})
    approximates = "norms, which are constant"
    sends = "partial products of a and W, rank (out + rank) floats a kernel, for the norms of columns"
    factors_trained, factors_frozen = frozenset({"a", "b"}), frozenset({"scale"})
    base_leaves = {"w2": lambda weight, _: _squares(weight)}

    rank: int = 16
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {**PAIR_AXES, "m": ("out",), "w2": ("out",)}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        train = {"a": kaiming_uniform(key, fan_in, self.rank, hint), "b": jnp.zeros((self.rank, fan_out))}
        frozen = {"scale": scaling(self.alpha, self.rank, hint), **dropout_leaf(self.dropout)}
        return self.refit(weight, Fitted(train, frozen))

    def refit(self, weight: Weight, fitted: Fitted) -> Fitted:
        frozen = {**fitted.frozen, "w2": _squares(weight)}
        return fitted._replace(train={**fitted.train, "m": _norm(weight, fitted.train, frozen)}, frozen=frozen)

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        train = adapter.train
        ratio = (train["m"] / jax.lax.stop_gradient(_norm(weight, train, adapter.frozen)))[None, :]
        base, dropped = matmul(x, weight), dropout(x, adapter, ctx)
        low = (cast(adapter.frozen["scale"], x) * (dropped @ cast(train["a"], x))) @ cast(train["b"], x)
        if dropped is x:
            # Saved for the gradient of m, else rematerialised layers would multiply by W once more.
            return in_float32(lambda y: cast(ratio, y) * y, checkpoint_name(base + low, HIDDEN))
        return base + cast(ratio - 1, x) * matmul(dropped, weight) + cast(ratio, x) * low

    def apply_grouped(
        self, x: Float[Array, "rows in"], weight: Weight, sizes: Sizes, adapter: Adapter, ctx: Context
    ) -> Float[Array, "rows out"]:
        train = adapter.train
        norms = over_stack(lambda w, node: _norm(w, node.train, node.frozen), (sizes.experts,))(weight, adapter)
        a, b = cast(adapter.frozen["scale"][:, None, None] * train["a"], x), cast(train["b"], x)
        ratio, dropped = train["m"] / jax.lax.stop_gradient(norms), grouped_dropout(x, sizes, adapter, ctx)
        if dropped is x:
            x, hidden = branch_matmul(x, a, sizes)
            y = checkpoint_name(add_matmul(grouped_matmul(x, weight, sizes), hidden, b, sizes), HIDDEN)
            return in_float32(lambda y: row_factors(ratio, sizes, y) * y, y)
        low = grouped_matmul(grouped_matmul(dropped, a, sizes), b, sizes)
        change = row_factors(ratio - 1, sizes, low) * grouped_matmul(dropped, weight, sizes)
        return grouped_matmul(x, weight, sizes) + change + row_factors(ratio, sizes, low) * low

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        train = adapter.train
        direction = dense(weight).astype(jnp.float32) + pair_weight(train["a"], train["b"], adapter.frozen["scale"])
        norm = _root(jnp.sum(jnp.square(direction), axis=0), _squares(weight))
        return direction * (train["m"] / norm)[None, :]


def _squares(weight: Weight) -> Float[Array, " out"]:
    """|w_j|^2 of every column, float32."""
    return jnp.sum(jnp.square(dense(weight).astype(jnp.float32)), axis=0)


def _root(n2: Float[Array, " out"], w2: Float[Array, " out"]) -> Float[Array, " out"]:
    """The square root of n2, bounded below: in a column that cancels, n2 is a rounding error and may be negative."""
    return jnp.sqrt(jnp.maximum(n2, jnp.maximum(SMALLEST**2 * w2, jnp.finfo(jnp.float32).tiny)))


def _norm(weight: Weight, train: Leaves, frozen: Leaves) -> Float[Array, " out"]:
    """||W + s a b|| per output column by the Gram identity, float32."""
    with jax.default_matmul_precision("highest"):
        sa, b = frozen["scale"] * train["a"], train["b"]
        cross, square = jnp.sum(matmul(sa.T, weight) * b, axis=0), jnp.sum(((sa.T @ sa) @ b) * b, axis=0)
        return _root(frozen["w2"] + 2.0 * cross + square, frozen["w2"])
