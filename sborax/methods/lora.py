"""LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685; rsLoRA, arXiv:2312.03732."""

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
    Rank,
    SboraxError,
    Weight,
    check_rank,
    dropout_leaf,
    hyper,
    live,
    structure,
    width,
)
from sborax.adapters.linalg import qr
from sborax.methods.lowrank import PAIR_AXES, kaiming_uniform, pair_delta, pair_weight, scaling


@dataclasses.dataclass(frozen=True)
class LoRA(AbstractFactored):
    """y = x W + s (x a) b, with a (in, rank), b (rank, out).

    rank: width of the factors, an int or a `RankPolicy`.
    alpha: s = alpha / rank; None (default) is s = 1.
    rslora: s = alpha / sqrt(rank) instead, which needs an alpha.
    dropout: rate on the adapter's input in training (paper: 0 to 0.1; default 0).
    init_a: "kaiming", a ~ U(-1/sqrt(in), 1/sqrt(in)), as released; "gaussian", a ~ N(0, 1/rank^2). b = 0. Or
        "orthogonal", for an even rank: a = G Q_1 / 10, b = Q_2^T H / 10, with G and H ~ N(0, 1), and Q_1 and Q_2 the
        even and odd rows of a random orthogonal matrix. So a b = 0, but neither is zero (from PEFT, not from a paper).
        On an embedding a = 0, b ~ N(0, 1), as released. If the head shares it, b^T starts like `a` on a kernel (PEFT).

    Identity at init. Exact merge W + s a b. Trained parameters: rank (in + out).
    The paper's A is our a transposed, its B our b transposed.
    """

    paper = "LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685"
    group_b = frozenset({"b"})
    ragged = True
    pair = True

    rank: Rank = 8
    alpha: float | None = hyper(None, above=0.0)
    rslora: bool = hyper(False)
    dropout: float = hyper(0.0)
    init_a: Literal["kaiming", "gaussian", "orthogonal"] = hyper("kaiming")

    @property
    def axes(self) -> Axes:
        return PAIR_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.init_a not in ("kaiming", "gaussian", "orthogonal"):
            raise SboraxError(f"init_a must be 'kaiming', 'gaussian' or 'orthogonal', got {self.init_a!r}")
        ranks = self.rank if isinstance(self.rank, tuple) else (width(self.rank),)
        if self.init_a == "orthogonal" and any(rank % 2 for rank in ranks):
            raise SboraxError(f"init_a='orthogonal' splits the ranks into halves: rank must be even, got {self.rank}")
        if self.rslora and self.alpha is None:
            raise SboraxError("rslora divides alpha by sqrt(rank), but alpha is None: give one, such as alpha=16")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        if hint.use == "kernel":
            a, b = self._start(key, fan_in, fan_out, hint)
        elif hint.use == "lookup":
            a = jnp.zeros((fan_in, width(self.rank)))
            b = jax.random.normal(key, (width(self.rank), fan_out))
        else:
            b, a = (factor.T for factor in self._start(key, fan_out, fan_in, hint))
        scale = scaling(self.alpha, self.rank, hint, self.rslora)
        return Fitted({"a": a, "b": b}, {"scale": scale, **dropout_leaf(self.dropout)})

    def _start(
        self, key: Key[Array, ""], fan_in: int, fan_out: int, hint: Hint
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        """The factors on a kernel."""
        rank, mask = live(self.rank, hint)
        if self.init_a == "orthogonal":
            return _orthogonal(key, fan_in, fan_out, mask)
        if self.init_a == "kaiming":
            a = kaiming_uniform(key, fan_in, self.rank, hint)
        else:
            a = jax.random.normal(key, (width(self.rank), fan_in)).T * mask[None, :] / rank
        return a, jnp.zeros((width(self.rank), fan_out))

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + pair_delta(x, adapter, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        return adapter.frozen["scale"] * adapter.train["a"], adapter.train["b"]


def _orthogonal(
    key: Key[Array, ""], fan_in: int, fan_out: int, mask: Float[Array, " rank"]
) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
    """Factors whose product is zero. mask: 0 in padded columns, on which the others do not depend."""
    of_square, of_a, of_b = jax.random.split(key, 3)
    wide, half = len(mask), mask[::2, None]
    rows = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(of_square, row), (wide,)))(jnp.arange(wide))
    q, _ = qr(rows * mask[:, None] * mask[None, :] + jnp.diag(1 - mask))
    left = half * jax.random.normal(of_a, (wide // 2, fan_in))
    right = half * jax.random.normal(of_b, (wide // 2, fan_out))
    return jnp.matmul(left.T, q[::2], precision="highest") / 10, jnp.matmul(q[1::2].T, right, precision="highest") / 10


def lora_of(a: Float[Array, "*stack in rank"], b: Float[Array, "*stack rank out"], like: Adapter) -> Adapter:
    """The adapter of a LoRA of scale 1, y = x W + (x a) b, with the dropout of `like`, which has the same stack."""
    frozen = {**like.frozen, "scale": jnp.ones_like(like.frozen["scale"])}
    return Adapter({"a": a, "b": b}, frozen, structure(LoRA(a.shape[-1])), like.in_axes)
