"""LoHa: low-rank Hadamard product, arXiv:2309.14859 (LyCORIS), after FedPara, arXiv:2108.06098."""

import dataclasses
import math

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
    dropout_leaf,
    hyper,
    output_dropout,
)
from sborax.methods.lowrank import HIDDEN, kaiming_uniform, scaling


@dataclasses.dataclass(frozen=True)
class LoHa(AbstractFactored):
    """y = x W + s x ((a1 b1) * (a2 b2)), * entry by entry, a1 and a2 (in, rank), b1 and b2 (rank, out).

    The change has rank up to rank^2 and is computed as such: (a1 b1) * (a2 b2) = a b, where the rank^2 columns of a
    are all products of a column of a1 with one of a2, and the rows of b likewise. No weight is formed.

    rank: width of each pair (PEFT: 8). Beyond the square root of a side, a and b are no longer thin.
    alpha: s = alpha / rank; None (default) is s = 1.
    rank_dropout: rate at which outputs of the change are dropped, the same ones for all tokens of a call; default 0.
        The others are divided by the share that is kept, as in PEFT. If all are dropped, the change is 0 (PEFT: NaN).
    module_dropout: rate at which the whole change is dropped in a call; default 0. What is kept is not rescaled, as
        in PEFT.

    a1 ~ U(-1/sqrt(in), 1/sqrt(in)), b1 and b2 ~ U(-1/sqrt(rank), 1/sqrt(rank)), a2 = 0, as PEFT. Identity at init.
    Exact merge. Trained parameters: 2 rank (in + out).
    """

    paper = "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv:2309.14859"
    sends = "gradients of the products of columns, rank times those of the leaves"

    rank: int = 8
    alpha: float | None = hyper(None, above=0.0)
    rank_dropout: float = hyper(0.0)
    module_dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        side_in, side_out = ("in", "rank"), ("rank", "out")
        rates = {"rank_dropout": (), "module_dropout": ()}
        return {"a1": side_in, "b1": side_out, "a2": side_in, "b2": side_out, "scale": (), **rates}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        of_a1, of_b1, of_b2 = jax.random.split(key, 3)
        bound = 1.0 / math.sqrt(self.rank)

        def right(key: Key[Array, ""]) -> Array:
            return jax.random.uniform(key, (self.rank, fan_out), jnp.float32, -bound, bound)

        a1, a2 = kaiming_uniform(of_a1, fan_in, self.rank, hint), jnp.zeros((fan_in, self.rank))
        train = {"a1": a1, "b1": right(of_b1), "a2": a2, "b2": right(of_b2)}
        rates = dropout_leaf(self.rank_dropout, "rank_dropout") | dropout_leaf(self.module_dropout, "module_dropout")
        return Fitted(train, {"scale": scaling(self.alpha, self.rank, hint), **rates})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        a, b = self.factors(adapter, (x.shape[1], y.shape[1]))
        change = checkpoint_name(x @ cast(a, x), HIDDEN) @ cast(b, x)
        return y + output_dropout(change, adapter, ctx, rescaled=True)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        a, b = self.factors(adapter, (weight.shape[0], weight.shape[1]))
        return weight + jnp.matmul(a, b, precision="highest")

    def factors(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Float[Array, "in r2"], Float[Array, "r2 out"]]:
        train, square = adapter.train, self.rank**2
        a = adapter.frozen["scale"] * train["a1"][:, :, None] * train["a2"][:, None, :]
        b = train["b1"][:, None, :] * train["b2"][None, :, :]
        return a.reshape(shape[0], square), b.reshape(square, shape[1])
