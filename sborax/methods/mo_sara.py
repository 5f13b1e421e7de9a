"""Mo-SARA: a mixture of singular-value sets over frozen singular vectors, arXiv:2408.03290."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractAdditive,
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
    dense,
    hyper,
    live,
    width,
)
from sborax.adapters.linalg import svd
from sborax.adapters.ranks import SingularMass


@dataclasses.dataclass(frozen=True)
class MoSARA(AbstractAdditive):
    """y = x W + gamma v * ((sum_i g_i lam_i * z) b), z = x a, g = softmax(z w1 w2): every token mixes n diagonals.

    W = a diag(S) b + ...: a (in, k) and b (k, out) are the leading singular vectors, frozen. lam (n, k), v (out).

    rank: `SingularMass(threshold)`, an int or another policy; default threshold 0.5.
    sets: n, at least 2; default 5.
    router: "rank1" (default), w1 (k, 1), w2 (1, n); "full", one w1 (k, n).
    gamma: default 1.

    v = 0, lam ~ N(0, 1/k), w ~ N(0, 0.02^2), all three our choice: the paper's were not found. Identity at init.
    No merge: gates depend on the token; `mean_gate_weight` is the approximation with one gate for all.
    Trained parameters: n k + out + k + n, or n k + out + k n with the full router.
    """

    paper = "SARA: Singular-Value Based Adaptive Low-Rank Adaption, arXiv:2408.03290"
    no_merge = "its gates depend on the token; mean_gate_weight approximates them by their mean"
    ragged = True

    rank: Rank = SingularMass(0.5)
    sets: int = 5
    router: Literal["rank1", "full"] = "rank1"
    gamma: float = hyper(1.0, above=0.0)

    @property
    def axes(self) -> Axes:
        router = {"w1": ("rank", None)} | ({"w2": (None, None)} if self.router == "rank1" else {})
        return {"a": ("in", "rank"), "b": ("rank", "out"), "lam": (None, "rank"), "v": ("out",), "scale": (), **router}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.router not in ("rank1", "full"):
            raise SboraxError(f"router must be 'rank1' or 'full', got {self.router!r}")
        if self.sets < 2:
            raise SboraxError(
                f"sets must be at least 2, got {self.sets}: the gate of one set is always 1 and never trains"
            )

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        rank, mask = live(self.rank, hint)
        k = width(self.rank)
        u, _, vt = svd(dense(weight).astype(jnp.float32))
        lam_key, down, up = jax.random.split(key, 3)
        lam = jax.random.normal(lam_key, (k, self.sets)).T * (mask / jnp.sqrt(rank))[None, :]
        first = 0.02 * jax.random.normal(down, (k, 1 if self.router == "rank1" else self.sets)) * mask[:, None]
        router = {"w1": first}
        if self.router == "rank1":
            router["w2"] = 0.02 * jax.random.normal(up, (1, self.sets))
        frozen = {"a": u[:, :k] * mask[None, :], "b": vt[:k] * mask[:, None], "scale": jnp.float32(self.gamma)}
        return Fitted({"lam": lam, "v": jnp.zeros(weight.shape[1]), **router}, frozen)

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        z = x @ cast(adapter.frozen["a"], x)
        mixed = cast(_gates(z, adapter), x) @ cast(adapter.train["lam"], x)
        gain = cast(adapter.frozen["scale"] * adapter.train["v"], x)
        return y + gain[None, :] * ((mixed * z) @ cast(adapter.frozen["b"], x))

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        raise SboraxError(f"MoSARA cannot be merged: {self.no_merge}")


def _gates(z: Float[Array, "tokens k"], adapter: Adapter) -> Float[Array, "tokens n"]:
    logits = z.astype(jnp.float32) @ adapter.train["w1"]
    return jax.nn.softmax(logits @ adapter.train["w2"] if "w2" in adapter.train else logits, axis=-1)


def mean_gates(x: Float[Array, "tokens in"], adapter: Adapter) -> Float[Array, " n"]:
    """The mean gates of one layer over `x`, the inputs of its projection without padding."""
    return jnp.mean(_gates(x @ cast(adapter.frozen["a"], x), adapter), axis=0)


def mean_gate_weight(
    weight: Float[Array, "in out"], adapter: Adapter, gates: Float[Array, " n"]
) -> Float[Array, "in out"]:
    """W + gamma a diag(g lam) b diag(v), float32, of one layer: an approximation, exact where every gate is `gates`."""
    diagonal = adapter.frozen["scale"] * (gates @ adapter.train["lam"])
    change = jnp.matmul(adapter.frozen["a"] * diagonal[None, :], adapter.frozen["b"], precision="highest")
    return weight.astype(jnp.float32) + change * adapter.train["v"][None, :]
