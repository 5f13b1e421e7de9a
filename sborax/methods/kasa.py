"""KaSA: Knowledge-Aware Singular-Value Adaptation, arXiv:2412.06071."""

import dataclasses

import jax
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
    Weight,
    cast,
    check_rank,
    dense,
    dropout,
    dropout_leaf,
    hyper,
)
from sborax.adapters.linalg import svd
from sborax.methods.lowrank import OFFSET_AXES, kaiming_uniform, pair_weight, scaling, taken_from_base


@dataclasses.dataclass(frozen=True)
class KaSA(AbstractFactored):
    """y = x W_k + s ((x a) * e) b, where W_k is W without its r smallest singular components.

    W = U S V^T;  W_k = W - U_r S_r V_r^T, with the last r of each. a (in, rank), e (rank), b (rank, out).

    rank: width of the factors, and how many singular components the base loses, as in PEFT; below the smaller side.
    alpha: s = alpha / rank; None (default) is s = 1.
    dropout: rate on the adapter's input; default 0.

    a as in LoRA, e ~ N(0, 1), b = 0. Not the identity at init: the adapted function is that of W_k. Rewrites the base;
    what it lost is kept, so the change against the original base is exact at rank 2r. Exact merge W_k + s a diag(e) b.
    The paper adds beta |e|^2 + gamma (|a^T a - I| + |b b^T - I|) to the loss, which `sx.KaSALoss` does.
    Trained parameters: rank (in + out + 1). The paper's dW = U dS V^T has our b^T for U and a^T for V^T.
    """

    paper = "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, arXiv:2412.06071"
    group_b = frozenset({"b", "e"})
    rewrites_base = True
    identity_at_init = False

    rank: int = 8
    alpha: float | None = hyper(None, above=0.0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {**OFFSET_AXES, "e": ("rank",)}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape) - 1, "less than the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        wide, (of_a, of_e) = dense(weight).astype(jnp.float32), jax.random.split(key)
        scale = scaling(self.alpha, self.rank, hint)
        u, s, vt = svd(wide)
        root = jnp.sqrt(s[-self.rank :] / scale)
        lost = u[:, -self.rank :] * root[None, :], root[:, None] * vt[-self.rank :]
        fitted = taken_from_base(wide, *lost, scale, dropout_leaf(self.dropout))
        a, e = kaiming_uniform(of_a, wide.shape[0], self.rank, hint), jax.random.normal(of_e, (self.rank,))
        return fitted._replace(train={"a": a, "e": e, "b": jnp.zeros((self.rank, wide.shape[1]))})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        hidden = checkpoint_name(dropout(x, adapter, ctx) @ cast(adapter.train["a"], x), HIDDEN)
        gain = cast(adapter.frozen["scale"] * adapter.train["e"], x)[None, :]
        return y + (hidden * gain) @ cast(adapter.train["b"], x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        train = adapter.train
        return weight + pair_weight(train["a"] * train["e"][None, :], train["b"], adapter.frozen["scale"])

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r2"], Float[Array, "r2 out"]]:
        train, frozen = adapter.train, adapter.frozen
        a = jnp.concatenate([train["a"] * train["e"][None, :], -frozen["a0"]], axis=-1)
        return frozen["scale"] * a, jnp.concatenate([train["b"], frozen["b0"]], axis=-2)
