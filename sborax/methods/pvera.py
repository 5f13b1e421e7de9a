"""PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, arXiv:2512.07703."""

import dataclasses

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
    Weight,
    cast,
    check_rank,
    dropout,
    dropout_leaf,
    hyper,
)
from sborax.methods.lowrank import HIDDEN
from sborax.methods.projection import shared_rows


@dataclasses.dataclass(frozen=True)
class PVeRA(AbstractFactored):
    """y = x W + (z b) * m, where z is normal with mean s (x a1) * d1 and log-variance s (x a2) * d2.

    a = [a1, a2] (in, 2 rank) and b (rank, out) are random and frozen, d = [d1, d2] and m are trained vectors. In
    training z is drawn anew for every token. Elsewhere it is its mean, as in PEFT unless sample_at_inference=True.

    rank: width of z (PEFT: 256).
    d_initial: starting value of d (PEFT: 0.1).
    projection_seed: the seed of a and b, which are the same for every kernel, cut to its size (PEFT: 0).
    dropout: rate on x; default 0.

    Entries of a are uniform with variance 1 and s = sqrt(2 / in), those of b with variance 2 / rank: Kaiming
    initialisation, as in PEFT. They are kept with the adapter, so no file depends on a generator. m = 0: identity at
    init. Exact merge of the mean. Trained parameters: 2 rank + out.
    """

    paper = "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, arXiv:2512.07703"
    group_b = frozenset({"d", "m"})
    draws = "z, around its mean"
    sends = "log-variances, rank floats a token, where the input is cut"

    rank: int = 256
    d_initial: float = hyper(0.1, above=0.0)
    projection_seed: int = hyper(0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {"d": (None,), "m": ("out",), "a": ("in", None), "b": ("rank", "out"), "scale": (), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        of_a, of_b = jax.random.split(jax.random.key(self.projection_seed))
        a = shared_rows(of_a, fan_in, 2 * self.rank)
        b = shared_rows(of_b, fan_out, self.rank).T * (2.0 / self.rank) ** 0.5
        train = {"d": jnp.full(2 * self.rank, self.d_initial, jnp.float32), "m": jnp.zeros(fan_out)}
        scale = jnp.float32((2.0 / fan_in) ** 0.5)
        return Fitted(train, {"a": a, "b": b, "scale": scale, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        parts = slice(self.rank if ctx.key is None else 2 * self.rank)
        gain = cast(adapter.frozen["scale"] * adapter.train["d"][parts], x)[None, :]
        hidden = checkpoint_name(dropout(x, adapter, ctx) @ cast(adapter.frozen["a"][:, parts], x), HIDDEN) * gain
        if ctx.key is not None:
            mean, log_variance = jnp.split(hidden, 2, axis=1)
            # Not the key itself, with which `dropout` draws.
            noise = jax.random.normal(jax.random.fold_in(ctx.key, 1), mean.shape, mean.dtype)
            hidden = mean + noise * jnp.exp(log_variance / 2)
        return y + (hidden @ cast(adapter.frozen["b"], x)) * cast(adapter.train["m"], x)[None, :]

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        a, b = self.factors(adapter, (weight.shape[0], weight.shape[1]))
        return weight + jnp.matmul(a, b, precision="highest")

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        """Of the mean."""
        gain = adapter.frozen["scale"] * adapter.train["d"][: self.rank]
        return adapter.frozen["a"][:, : self.rank] * gain[None, :], adapter.frozen["b"] * adapter.train["m"][None, :]
