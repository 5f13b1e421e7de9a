"""Orthogonal Adaptation for Modular Customization of Diffusion Models, arXiv:2312.02432."""

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
    SboraxError,
    Weight,
    check_rank,
    dropout_leaf,
    hyper,
)
from sborax.adapters.experts import AbstractExpert, basis_key, check_block, check_expert
from sborax.adapters.linalg import qr
from sborax.methods.lowrank import PAIR_AXES, pair_delta, pair_weight, scaling


@dataclasses.dataclass(frozen=True)
class OrthogonalAdaptation(AbstractExpert):
    """y = x W + s (x a) b, one factor frozen to this expert's columns of an orthogonal basis Q that all experts share.

    side="in" (default): a = Q[:, block], b trained.  side="out": b = Q[:, block]^T, a trained.
    The frozen factors q of two experts are orthogonal, so each expert can be read from a sum of experts:
    q^T (sum_i delta_i) = s b for side "in", (sum_i delta_i) q = s a for "out".

    basis="gaussian", the paper's other choice: the frozen factor q has entries from N(0, sigma^2), drawn for each
    expert by itself. Then E[q_i^T q_j] = 0, but q_i^T q_j has entries of size sigma^2 sqrt(size): experts interfere.
    On inputs in span(q_i), expert j adds about sqrt(rank / size) of what expert i adds, for trained factors of equal
    size. `combine_experts` refuses such experts; `add` sums them, as the paper does.

    rank: width of a block; the paper's was not found.
    alpha: s = alpha / rank; None (default) is s = 1. For the paper's merging weights use `scale` on each expert.
    side: which factor is frozen.
    expert, experts: block `expert` of `experts`; all orthogonal blocks must fit into the side, any number of Gaussian.
    basis_seed: the same for experts that will be combined. Q = qr(N(0, 1)) depends only on it and on the side's size; a
        Gaussian block also depends on `expert`.
    basis: "orthogonal" (default) or "gaussian"; the paper compares both.
    sigma: of "gaussian"; None (default) is 1 / sqrt(size), so that columns have length 1 in expectation (ours; the
        paper's was not found).
    dropout: default 0.

    The trained factor starts at zero. Identity at init. Exact merge. Trained parameters: rank out, or rank in.
    """

    paper = "Orthogonal Adaptation for Modular Customization of Diffusion Models, arXiv:2312.02432"
    group_b = frozenset({"b"})

    rank: int = 16
    alpha: float | None = hyper(None, above=0.0)
    side: Literal["in", "out"] = "in"
    expert: int = hyper(0)
    experts: int = hyper(1)
    basis_seed: int = hyper(0)
    dropout: float = hyper(0.0)
    basis: Literal["orthogonal", "gaussian"] = "orthogonal"
    sigma: float | None = hyper(None, above=0.0)

    @property
    def interferes(self) -> str:
        return "" if self.basis == "orthogonal" else "its Gaussian blocks are orthogonal in expectation alone"

    @property
    def axes(self) -> Axes:
        return PAIR_AXES

    def check(self, shape: tuple[int, int]) -> None:
        if self.side not in ("in", "out"):
            raise SboraxError(f"side must be 'in' or 'out', got {self.side!r}")
        size = shape[0] if self.side == "in" else shape[1]
        check_rank(self.rank, size, f"the {self.side}put side")
        if self.basis not in ("orthogonal", "gaussian"):
            raise SboraxError(f"basis must be 'orthogonal' or 'gaussian', got {self.basis!r}")
        if self.basis == "gaussian":
            check_expert(self.expert, self.experts)
            return
        check_block(self.expert, self.experts, self.rank, size)
        if self.sigma is not None:
            raise SboraxError(f"sigma={self.sigma} is of basis='gaussian'; an orthogonal basis has columns of length 1")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        frozen = {"scale": scaling(self.alpha, self.rank, hint), **dropout_leaf(self.dropout)}
        if self.side == "in":
            return Fitted({"b": jnp.zeros((self.rank, fan_out))}, {"a": self._block(fan_in), **frozen})
        return Fitted({"a": jnp.zeros((fan_in, self.rank))}, {"b": self._block(fan_out).T, **frozen})

    def _block(self, size: int) -> Float[Array, "size r"]:
        if self.basis == "gaussian":
            key = jax.random.fold_in(basis_key(self.basis_seed, size), self.expert)
            sigma = size**-0.5 if self.sigma is None else self.sigma
            return sigma * jax.random.normal(key, (size, self.rank))
        # Column j of Q needs columns 0..j of the Gaussian alone, so a block costs no size x size matrix.
        keys = jax.random.split(basis_key(self.basis_seed, size), size)[: (self.expert + 1) * self.rank]
        gaussian = jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys).T
        return qr(gaussian)[0][:, self.expert * self.rank :]

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + pair_delta(x, _with_frozen(adapter), ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        pair = _with_frozen(adapter)
        return weight + pair_weight(pair.train["a"], pair.train["b"], pair.frozen["scale"])

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        pair = _with_frozen(adapter)
        return pair.frozen["scale"] * pair.train["a"], pair.train["b"]

    def overlaps(self, adapter: Adapter, other: Adapter) -> Bool[Array, ""]:
        assert isinstance(other.method, OrthogonalAdaptation)
        if self.side != other.method.side:
            return jnp.array(True)
        name, product = ("a", "...ir,...is->...rs") if self.side == "in" else ("b", "...ro,...so->...rs")
        cross = jnp.einsum(product, adapter.frozen[name], other.frozen[name], precision="highest")
        return jnp.max(jnp.abs(cross)) > 1e-4


def _with_frozen(adapter: Adapter) -> Adapter:
    """The adapter with both factors among its trained leaves, as the functions of pairs read them."""
    return dataclasses.replace(adapter, train={**adapter.frozen, **adapter.train})
