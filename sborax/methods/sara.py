"""SARA: Singular-Value Based Adaptive Low-Rank Adaption, arXiv:2408.03290."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
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
    dense,
    dropout,
    dropout_leaf,
    hyper,
    live,
    width,
)
from sborax.adapters.linalg import singular_values, svd
from sborax.adapters.ranks import SingularMass
from sborax.methods.lowrank import HIDDEN, PAIR_AXES, kaiming_uniform, pair_weight, scaling


@dataclasses.dataclass(frozen=True)
class SARA(AbstractFactored):
    """y = x W + s (x a) diag(lam) b, with a (in, k), lam (k), b (k, out), k from the layer's singular values.

    rank: `SingularMass(threshold)`, an int or another policy. The paper's threshold was not found; default 0.02.
    factor_init: "lora" (default), a ~ U(-1/sqrt(in), 1/sqrt(in)), b = 0; "svd", a = U_k, b = V_k^T of W, lam = 0.
    lam_init: "sigma" (as None, default), the k largest singular values over their mean; "ones"; "normal", N(0, 1).
    gamma, alpha, rslora: s = gamma, times alpha / k (alpha / sqrt(k) if rslora) if alpha is given; default s = 1.
    dropout: rate on x; default 0.

    The paper's initial values are not known for certain: these start at the base. Identity at init. Exact merge.
    Trained parameters: k (in + out + 1).
    """

    paper = "SARA: Singular-Value Based Adaptive Low-Rank Adaption, arXiv:2408.03290"
    group_b = frozenset({"b"})
    ragged = True

    rank: Rank = SingularMass(0.02)
    factor_init: Literal["lora", "svd"] = hyper("lora")
    lam_init: Literal["sigma", "ones", "normal"] | None = hyper(None)
    gamma: float = hyper(1.0, above=0.0)
    alpha: float | None = hyper(None, above=0.0)
    rslora: bool = hyper(False)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {**PAIR_AXES, "lam": ("rank",)}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if (self.factor_init, self.lam_init) not in _STARTS:
            raise SboraxError(f"(factor_init, lam_init) must be in {_STARTS}, got {(self.factor_init, self.lam_init)}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        rank, mask = live(self.rank, hint)
        k, wide = width(self.rank), dense(weight).astype(jnp.float32)
        if self.factor_init == "svd":
            u, _, vt = svd(wide)
            a, b, lam = u[:, :k] * mask[None, :], vt[:k] * mask[:, None], jnp.zeros(k)
        else:
            a, b = kaiming_uniform(key, weight.shape[0], self.rank, hint), jnp.zeros((k, weight.shape[1]))
            lam = mask * self._lam(jax.random.fold_in(key, 1), wide, rank, mask)
        scale = self.gamma * scaling(self.alpha, self.rank, hint, self.rslora)
        return Fitted({"a": a, "lam": lam, "b": b}, {"scale": scale, **dropout_leaf(self.dropout)})

    def _lam(self, key: Key[Array, ""], weight: Array, rank: Array, mask: Float[Array, " k"]) -> Float[Array, " k"]:
        if self.lam_init == "ones":
            return jnp.ones_like(mask)
        if self.lam_init == "normal":
            return jax.random.normal(key, mask.shape)
        leading = mask * singular_values(weight)[: len(mask)]
        mean = jnp.sum(leading) / rank
        return jnp.where(mean > 0, leading / mean, 1.0)

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        train = adapter.train
        hidden = dropout(x, adapter, ctx) @ cast(train["a"], x)
        hidden = checkpoint_name(cast(adapter.frozen["scale"] * train["lam"], x)[None, :] * hidden, HIDDEN)
        return y + hidden @ cast(train["b"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        scaled = adapter.frozen["scale"] * adapter.train["lam"]
        return weight + pair_weight(adapter.train["a"] * scaled[None, :], adapter.train["b"], jnp.float32(1.0))

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in k"], Float[Array, "k out"]]:
        return adapter.train["a"] * (adapter.frozen["scale"] * adapter.train["lam"])[None, :], adapter.train["b"]


_STARTS = (("lora", None), ("lora", "sigma"), ("lora", "ones"), ("lora", "normal"), ("svd", None))
