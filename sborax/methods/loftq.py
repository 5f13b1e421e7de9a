"""LoftQ: LoRA-Fine-Tuning-aware Quantization, arXiv:2310.08659."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractFactored,
    AbstractWeight,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Weight,
    check_rank,
    check_repetitions,
    dense,
    dropout_leaf,
    hyper,
)
from sborax.methods import lowrank


@dataclasses.dataclass(frozen=True)
class LoftQ(AbstractFactored):
    """y = x Q + s (x a) b, where a b starts as the best rank-r part of W - Q, the error of the quantised base Q.

    P_0 = 0;  Q_t = nf4(W - P_t-1), P_t = U_r S_r V_r^T of W - Q_t;  Q = Q_T, a = U_r sqrt(S_r), b = sqrt(S_r) V_r^T.

    rank: width of the factors (default 16).
    alpha: s = alpha / rank; None (default) is s = 1.
    iterations: T (default 1, PEFT's; the paper has 5).
    divide: divide a and b by sqrt(s) each, so that s a b is P_T for every alpha. PEFT does not (default False), so its
        start is the paper's for s = 1 alone.
    dropout: rate on the adapter's input in training (default 0).

    For runs with `quant="nf4"`. NF4 is that of the run, with scales that are quantised again, as in QLoRA; PEFT's
    LoftQ keeps them in float32. A dense base loses nothing; there a and b start as in LoRA. Rewrites the base: `a0`,
    `b0` are P_(T-1), which is subtracted before the base is quantised. Merges into Q + s a b. Trained parameters:
    rank (in + out).
    """

    paper = "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models, arXiv:2310.08659"
    group_b = frozenset({"b"})
    rewrites_base = True
    pair = True
    of_quantised = "what the base loses in 4 bits"

    rank: int = 16
    alpha: float | None = hyper(None, above=0.0)
    iterations: int = 1
    divide: bool = False
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        return lowrank.OFFSET_AXES

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        check_repetitions("iterations", self.iterations, 1)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        wide, scale = dense(weight).astype(jnp.float32), lowrank.scaling(self.alpha, self.rank, hint)
        pair = a, b = jnp.zeros((wide.shape[0], self.rank)), jnp.zeros((self.rank, wide.shape[1]))
        lost = jnp.zeros_like(wide)
        for _ in range(self.iterations):
            pair, left = (a, b), wide - jnp.matmul(a, b, precision="highest")
            if isinstance(weight, AbstractWeight):
                lost = wide - weight.encode(left).dense().astype(jnp.float32)
            u, s, vt = lowrank.principal(key, lost, self.rank, None)
            root = jnp.sqrt(s)
            a, b = u * root[None, :], root[:, None] * vt
        fitted = lowrank.taken_from_base(wide, *_divided(pair, scale), scale, dropout_leaf(self.dropout))
        a, b = _divided((a, b), scale) if self.divide else (a, b)
        plain = lowrank.kaiming_uniform(key, wide.shape[0], self.rank, hint)
        alive = jnp.any(lost != 0)
        return fitted._replace(train={"a": jnp.where(alive, a, plain), "b": jnp.where(alive, b, 0.0)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + lowrank.pair_delta(x, adapter, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + lowrank.pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r2"], Float[Array, "r2 out"]]:
        return lowrank.offset_factors(adapter)


def _divided(pair: tuple[Array, Array], scale: Array) -> tuple[Array, Array]:
    """A pair of factors, each divided by sqrt(s)."""
    return pair[0] / jnp.sqrt(scale), pair[1] / jnp.sqrt(scale)
