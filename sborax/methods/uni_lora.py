"""Uni-LoRA: one trained vector for the whole model, arXiv:2506.00799."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.bank import AbstractBank, AbstractBanked, Load, bank_leaf
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
from sborax.methods.lowrank import HIDDEN

PAPER = "Uni-LoRA: One Vector is All You Need, arXiv:2506.00799"


@dataclasses.dataclass(frozen=True)
class UniLoRA(AbstractFactored, AbstractBanked):
    """y = x W + (x a) b: entries of a and b are entries of theta, one trained vector for the whole model, times gains.

    a = (theta * gain)[idx_a] and b = (theta * gain)[idx_b], with frozen random indices. gain_j = 1 / sqrt(n_j), where
    n_j counts how often all indices name j: the map from theta to the factors of all kernels is an isometry.

    rank: width of the factors (PEFT: 4). coefficients: length of theta (PEFT: 256).
    bound: theta starts uniform in [-bound, bound] (PEFT: 0.02).
    dropout: rate on x; default 0.

    In each kernel every index occurs equally often, give or take one, at random places. Indices depend on no other
    kernel; gains depend on which kernels are adapted. PEFT deals indices out over all kernels at once; the paper draws
    each index independently. Not the identity at init. Exact merge. The vector is one array for all kernels, so rules
    must agree on coefficients and bound.
    Trained parameters: none for each weight, and coefficients once.
    """

    paper = PAPER
    identity_at_init = False
    sends = "the factors that are made of theta, and their gradients"
    bank_name = "theta"
    bank_leaves = frozenset({"theta", "gain"})

    rank: int = 4
    coefficients: int = 256
    bound: float = hyper(0.02, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {"idx_a": ("in", "rank"), "idx_b": ("rank", "out"), "theta": (None,), "gain": (None,), "dropout": ()}

    def reads(self, shape: tuple[int, int]) -> int | None:
        return self.rank * sum(shape)

    def bank(self, shape: tuple[int, int], readers: int) -> AbstractBank:
        return SharedVector(self.coefficients, self.bound)

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        self.bank(shape, 1).check(shape)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        of_places, of_names = jax.random.split(key)
        count, size = self.rank * weight.shape[0], self.rank * sum(weight.shape)
        names = jax.random.permutation(of_names, self.coefficients).astype(jnp.int32)
        idx = names[jax.random.permutation(of_places, size) % self.coefficients]
        indices = {"idx_a": idx[:count].reshape(-1, self.rank), "idx_b": idx[count:].reshape(self.rank, -1)}
        return Fitted({}, {**indices, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        a, b = self.factors(adapter, (x.shape[1], y.shape[1]))
        return y + checkpoint_name(dropout(x, adapter, ctx) @ cast(a, x), HIDDEN) @ cast(b, x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + jnp.matmul(*self.factors(adapter, (weight.shape[0], weight.shape[1])), precision="highest")

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        entries = bank_leaf(adapter, "theta") * bank_leaf(adapter, "gain")
        return entries[adapter.frozen["idx_a"]], entries[adapter.frozen["idx_b"]]


@dataclasses.dataclass(frozen=True)
class SharedVector(AbstractBank):
    """The vector that `UniLoRA` trains, and the gains of its entries. See there for the options."""

    paper = PAPER
    group_b = frozenset({"theta"})

    coefficients: int
    bound: float = hyper()

    @property
    def axes(self) -> Axes:
        return {"theta": (None,), "gain": (None,)}

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.coefficients

    def check(self, shape: tuple[int, int]) -> None:
        if self.coefficients < 1:
            raise SboraxError(f"coefficients must be at least 1, got {self.coefficients}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        theta = jax.random.uniform(key, (self.coefficients,), minval=-self.bound, maxval=self.bound)
        return Fitted({"theta": theta}, {"gain": jnp.ones(self.coefficients)})

    def settle(self, bank: Adapter, readers: Sequence[Adapter], weights: Sequence[Load]) -> Adapter:
        places = jnp.concatenate([reader.frozen[side].reshape(-1) for reader in readers for side in ("idx_a", "idx_b")])
        counts = jnp.zeros(self.coefficients, jnp.int32).at[places].add(1)
        # Entries that no index names change nothing.
        gain = jnp.where(counts > 0, jax.lax.rsqrt(jnp.maximum(counts, 1).astype(jnp.float32)), 0.0)
        return dataclasses.replace(bank, frozen={"gain": gain})
