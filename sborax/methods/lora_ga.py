"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv:2407.05000."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractFactored,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    check_rank,
    check_repetitions,
    dense,
    dropout_leaf,
    hyper,
)
from sborax.adapters.linalg import singular_values
from sborax.methods import lowrank


@dataclasses.dataclass(frozen=True)
class LoRAGA(AbstractFactored):
    """y = x W_res + s (x a) b, where the first step of training follows the best rank-2r part of the gradient G of W.

    G = P S Q^T in our (in, out);  a = c P[:, :r], b = c Q[:, r:2r]^T;  W_res = W - s a b.

    rank: width r of the factors, 2 r at most the smaller side.
    alpha, rslora: s = alpha / sqrt(rank) (default, alpha 16) or alpha / rank; alpha None is s = 1.
    direction: which of the 2r pairs a and b take: "ArB2r" (default: as above), "A2rBr", "ArBr" (odd, even), "random".
    scale: c = out^(1/4) / sqrt(gamma) for "stable" (default, gamma 16), 1 for "unit", 1 / s for "gd", the mean of
        sqrt(sigma_i(W) / s), i < r, for "weightS".
    formula: "authors" (default), or "peft": c multiplies only b (except for "gd"), b is also multiplied by its singular
        values of G, c for "weightS" is sigma_1(W) over the first of these, and "random" gives a and b the same pairs.
    dropout: rate on x (default 0).
    norm_clip: shrink s a b so that no entry exceeds the largest of W; default False.
    niter: None (default) for the exact SVD of G, else subspace iterations at width 4r (authors: 4).

    Needs `Hint.grad`, see `gradient_hints`; where it is zero, LoRA's start. Identity at init. Rewrites the base; `a0`,
    `b0` are kept, so the change against the original base is exact at rank 2r. Trained parameters: rank (in + out).
    """

    paper = "LoRA-GA: Low-Rank Adaptation with Gradient Approximation, arXiv:2407.05000"
    group_b = frozenset({"b"})
    rewrites_base = True
    pair = True
    needs = frozenset({"grad"})

    rank: int = 8
    alpha: float | None = hyper(16.0, above=0.0)
    rslora: bool = hyper(True)
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = hyper("ArB2r")
    scale: Literal["stable", "unit", "gd", "weightS"] = hyper("stable")
    gamma: float = hyper(16.0, above=0.0)
    formula: Literal["authors", "peft"] = hyper("authors")
    norm_clip: bool = hyper(False)
    niter: int | None = hyper(None)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return lowrank.OFFSET_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape) // 2, "half the smaller side")
        options = (self.direction, self.scale, self.formula)
        if not all(option in allowed for option, allowed in zip(options, _KNOWN, strict=True)):
            raise SboraxError(f"direction, scale and formula must be of {_KNOWN}, got {options}")
        check_repetitions("niter", self.niter, 0)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        assert hint.grad is not None
        r, wide, grad = self.rank, dense(weight).astype(jnp.float32), jnp.asarray(hint.grad, jnp.float32)
        s = lowrank.scaling(self.alpha, r, hint, self.rslora)
        p, spectrum, qt = lowrank.principal(key, grad, min(4 * r, *grad.shape), self.niter)
        of_a, of_b = self._pairs(key)
        a, b, spectrum = p[:, of_a], qt[of_b], spectrum[of_b]
        if self.formula == "peft":
            b = spectrum[:, None] * b
        c_a, c_b = self._scales(wide, spectrum, s)
        a, b = c_a * a, c_b * b
        if self.norm_clip:
            ratio = jnp.max(jnp.abs(wide)) / jnp.max(jnp.abs(lowrank.pair_weight(a, b, s)))
            root = jnp.sqrt(jnp.minimum(ratio, 1.0))
            a, b = root * a, root * b
        alive = jnp.any(grad != 0)
        a = jnp.where(alive, a, lowrank.kaiming_uniform(key, wide.shape[0], r, hint))
        return lowrank.taken_from_base(wide, a, jnp.where(alive, b, 0.0), s, dropout_leaf(self.dropout))

    def _pairs(self, key: Key[Array, ""]) -> tuple[Array, Array]:
        r, order = self.rank, jnp.arange(2 * self.rank)
        if self.direction == "random":
            of_a, of_b = jnp.split(jax.random.permutation(key, order), 2)
            return of_a, of_a if self.formula == "peft" else of_b
        pairs = {"ArB2r": (order[:r], order[r:]), "A2rBr": (order[r:], order[:r]), "ArBr": (order[1::2], order[::2])}
        return pairs[self.direction]

    def _scales(self, weight: Float[Array, "in out"], spectrum: Float[Array, " r"], s: Array) -> tuple[Array, Array]:
        unit, authors = jnp.float32(1.0), self.formula == "authors"
        if self.scale == "gd":
            return 1.0 / s, 1.0 / s
        if self.scale == "stable":
            c = unit * weight.shape[1] ** 0.25 / self.gamma**0.5
        elif self.scale == "weightS":
            sigma = singular_values(weight)[: self.rank]
            c = jnp.mean(jnp.sqrt(sigma / s)) if authors else sigma[0] / spectrum[0]
        else:
            c = unit
        return (c if authors else unit), c

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + lowrank.pair_delta(x, adapter, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + lowrank.pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r2"], Float[Array, "r2 out"]]:
        return lowrank.offset_factors(adapter)


_KNOWN = (("ArB2r", "A2rBr", "ArBr", "random"), ("stable", "unit", "gd", "weightS"), ("authors", "peft"))
