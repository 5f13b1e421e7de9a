"""VeRA: Vector-based Random Matrix Adaptation, arXiv:2310.11454."""

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
class VeRA(AbstractFactored):
    """y = x W + s (((x a) * d) b) * m: frozen random a (in, rank) and b (rank, out), trained vectors d and m.

    rank: width of the frozen factors (PEFT: 256).
    d_initial: starting value of d (paper and PEFT: 0.1).
    projection_seed: the seed of a and b, which are the same for every kernel, cut to its size (PEFT: 0).
    dropout: rate on x; default 0.

    Entries of a and b are uniform with variance 1 and s = 2 / sqrt(in rank), the paper's Kaiming initialisation. They
    are kept with the adapter, so no file depends on a generator. m = 0: identity at init. Exact merge.
    Trained parameters: rank + out.
    """

    paper = "VeRA: Vector-based Random Matrix Adaptation, arXiv:2310.11454"
    group_b = frozenset({"d", "m"})

    rank: int = 256
    d_initial: float = hyper(0.1, above=0.0)
    projection_seed: int = hyper(0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return {"d": ("rank",), "m": ("out",), "a": ("in", "rank"), "b": ("rank", "out"), "scale": (), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        of_a, of_b = jax.random.split(jax.random.key(self.projection_seed))
        a, b = shared_rows(of_a, fan_in, self.rank), shared_rows(of_b, fan_out, self.rank).T
        scale = jnp.float32(2.0 / (fan_in * self.rank) ** 0.5)
        train = {"d": jnp.full(self.rank, self.d_initial, jnp.float32), "m": jnp.zeros(fan_out)}
        return Fitted(train, {"a": a, "b": b, "scale": scale, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        gain = cast(adapter.frozen["scale"] * adapter.train["d"], x)[None, :]
        hidden = checkpoint_name(dropout(x, adapter, ctx) @ cast(adapter.frozen["a"], x), HIDDEN)
        return y + ((hidden * gain) @ cast(adapter.frozen["b"], x)) * cast(adapter.train["m"], x)[None, :]

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        a, b = self.factors(adapter, (weight.shape[0], weight.shape[1]))
        return weight + jnp.matmul(a, b, precision="highest")

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        gain = adapter.frozen["scale"] * adapter.train["d"]
        return adapter.frozen["a"] * gain[None, :], adapter.frozen["b"] * adapter.train["m"][None, :]
