"""LoKr: low-rank Kronecker product, arXiv:2309.14859 (LyCORIS)."""

import dataclasses
import math

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
    SboraxError,
    Weight,
    cast,
    check_rank,
    dropout_leaf,
    hyper,
    output_dropout,
    signed,
)
from sborax.methods.lowrank import scaling


@dataclasses.dataclass(frozen=True)
class LoKr(AbstractAdditive):
    """y = x W + s x (c kron w), c (m, p) and w (n, k) with m n = in and p k = out.

    W'[i1 n + i2, o1 k + o2] = W[...] + s c[i1, o1] w[i2, o2]. The step contracts x with w, then with c: no weight.

    rank: w = a b with a (n, rank), b (rank, k), or w itself if rank >= max(n, k) / 2 (PEFT: 8).
    alpha: s = alpha / rank; None (default) is s = 1.
    factor: m and p are this number where it divides the side, else the largest divisor of the side that exceeds neither
        this number nor the side's square root; -1 (default): the largest divisor up to the square root, as in PEFT.
    both: factor c = c_a c_b as well, if rank < max(m, p) / 2; default False.
    rank_dropout: rate at which outputs of the change are dropped, the same ones for all tokens of a call; default 0.
    rank_dropout_scale: divide the others by the share that is left; default False, as in PEFT.
    module_dropout: rate at which the whole change is dropped in a call; default 0. What is kept is not rescaled, as
        in PEFT.

    c = 0 (c_b = 0); the rest is uniform in +-1/sqrt(size of the summed axis), as PEFT. Identity at init. Exact merge.
    Trained parameters: m p, or rank (m + p) for a factored c, plus rank (n + k), or n k for a w without factors.
    """

    paper = "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv:2309.14859"
    sends = "x or the gradient in y, whose blocks are not cut as their features are"

    rank: int = 8
    alpha: float | None = hyper(None, above=0.0)
    factor: int = signed(-1)
    both: bool = False
    rank_dropout: float = hyper(0.0)
    rank_dropout_scale: bool = False
    module_dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        left, right, full = (None, "rank"), ("rank", None), (None, None)
        rates = {"rank_dropout": (), "module_dropout": ()}
        return {"c": full, "c_a": left, "c_b": right, "w": full, "a": left, "b": right, "scale": (), **rates}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if self.factor != -1 and self.factor < 1:
            raise SboraxError(f"factor must be -1 or at least 1, got {self.factor}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        (m, n), (p, k) = (divisors(side, self.factor) for side in weight.shape)
        of_c, of_a, of_b = jax.random.split(key, 3)
        if self.both and self.rank < max(m, p) / 2:
            train = {"c_a": _uniform(of_c, m, (m, self.rank)), "c_b": jnp.zeros((self.rank, p))}
        else:
            train = {"c": jnp.zeros((m, p))}
        if self.rank < max(n, k) / 2:
            b = _uniform(of_b, self.rank, (self.rank, k))
            train |= {"a": _uniform(of_a, n, (n, self.rank)), "b": b}
        else:
            train |= {"w": _uniform(of_a, n, (n, k))}
        rates = dropout_leaf(self.rank_dropout, "rank_dropout") | dropout_leaf(self.module_dropout, "module_dropout")
        return Fitted(train, {"scale": scaling(self.alpha, self.rank, hint), **rates})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        train = {name: cast(leaf, x) for name, leaf in adapter.train.items()}
        c = cast(adapter.frozen["scale"], x) * (train["c"] if "c" in train else train["c_a"] @ train["c_b"])
        first = train["w"] if "w" in train else train["a"]
        low = (x.reshape(-1, first.shape[0]) @ first).reshape(x.shape[0], c.shape[0], first.shape[1])
        mixed = jnp.einsum("tmr,mp->tpr", low, c).reshape(-1, first.shape[1])
        change = (mixed if "w" in train else mixed @ train["b"]).reshape(y.shape)
        return y + output_dropout(change, adapter, ctx, self.rank_dropout_scale)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        train = adapter.train
        c = train["c"] if "c" in train else jnp.matmul(train["c_a"], train["c_b"], precision="highest")
        w = train["w"] if "w" in train else jnp.matmul(train["a"], train["b"], precision="highest")
        return weight + jnp.kron(adapter.frozen["scale"] * c, w)


def divisors(size: int, factor: int) -> tuple[int, int]:
    """`(m, n)` with m n = size: m is `factor` if it divides, else the largest divisor <= sqrt(size) and <= `factor`.

    factor -1 sets no bound.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
    m = max(divisor for divisor in range(1, limit + 1) if size % divisor == 0)
    return m, size // m


def _uniform(key: Key[Array, ""], summed: int, shape: tuple[int, int]) -> Float[Array, "a b"]:
    bound = 1.0 / math.sqrt(summed)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
