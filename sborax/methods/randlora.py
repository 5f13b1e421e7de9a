"""RandLoRA: full-rank parameter-efficient fine-tuning of large models, arXiv:2502.00987."""

import dataclasses

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
    Weight,
    cast,
    check_rank,
    dropout,
    dropout_leaf,
    hyper,
)
from sborax.methods.lowrank import scaling
from sborax.methods.projection import shared_rows


@dataclasses.dataclass(frozen=True)
class RandLoRA(AbstractAdditive):
    """y = x W + s x P D with D[p N + n, j] = l[p, n] q[p, j] g[n, j]: frozen random P and q, trained l and g.

    For out < in: P (in, rank N), q (rank, out), l (rank, N), g (N, out), N = ceil(out / rank). P D is a sum of N scaled
    products of random factors of width rank, so it can have full rank. For in <= out the change is s x D^T P^T, with
    P (out, rank N), q (rank, in), g (N, in) and N = ceil(in / rank).

    rank: width of one random basis (PEFT: 32). A larger rank means fewer bases and fewer trained numbers.
    alpha: s = alpha / rank; None (default) is s = 20, PEFT's 640 / 32.
    projection_seed: the seed of P and q, which are the same for every kernel, cut to its size (PEFT: 0).
    dropout: rate on x; default 0.

    Entries of P and q are uniform with variance 1 and kept with the adapter; l = 0, g = 1 / max(N, min(in, out)).
    Identity at init. Exact merge. Trained parameters: N (rank + min(in, out)).
    """

    paper = "RandLoRA: Full-rank parameter-efficient fine-tuning of large models, arXiv:2502.00987"
    materialises = "a full-rank sum of scaled bases has no thin form: they have min(in, out) squared entries together"

    rank: int = 32
    alpha: float | None = hyper(None, above=0.0)
    projection_seed: int = hyper(0)
    dropout: float = hyper(0.0)

    @property
    def axes(self) -> Axes:
        sides: dict[str, tuple[str | None, ...]] = {}
        for side in ("in", "out"):
            sides |= {f"g_{side}": (None, side), f"q_{side}": ("rank", side), f"p_{side}": (None, "rank", side)}
        return {**sides, "l": ("rank", None), "scale": (), "dropout": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        least, most = min(fan_in, fan_out), max(fan_in, fan_out)
        bases = -(-least // self.rank)
        of_q, of_p = jax.random.split(jax.random.key(self.projection_seed))
        p = jax.vmap(lambda n: shared_rows(jax.random.fold_in(of_p, n), most, self.rank))(jnp.arange(bases))
        p, q = p.transpose(0, 2, 1), shared_rows(of_q, least, self.rank).T
        train = {"l": jnp.zeros((self.rank, bases))}
        gain = jnp.full((bases, least), 1.0 / max(bases, least))
        scale = jnp.float32(20.0) if self.alpha is None else scaling(self.alpha, self.rank, hint)
        frozen = {"scale": scale, **dropout_leaf(self.dropout)}
        if fan_in <= fan_out:
            return Fitted({**train, "g_in": gain}, {**frozen, "q_in": q, "p_out": p})
        return Fitted({**train, "g_out": gain}, {**frozen, "q_out": q, "p_in": p})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        left, right = self._sides(adapter)
        return y + cast(adapter.frozen["scale"], x) * (dropout(x, adapter, ctx) @ cast(left, x)) @ cast(right, x)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        left, right = self._sides(adapter)
        return weight + adapter.frozen["scale"] * jnp.matmul(left, right, precision="highest")

    def _sides(self, adapter: Adapter) -> tuple[Float[Array, "in n"], Float[Array, "n out"]]:
        train, frozen = adapter.train, adapter.frozen
        narrow = "g_in" in train
        q, gain = (frozen["q_in"], train["g_in"]) if narrow else (frozen["q_out"], train["g_out"])
        scaled = (train["l"][:, :, None] * q[:, None, :] * gain[None, :, :]).reshape(-1, q.shape[1])
        # P counts its columns base by base, D by rank, as PEFT: a kernel with fewer bases then reads a part of P.
        p = (frozen["p_out"] if narrow else frozen["p_in"]).reshape(scaled.shape[0], -1)
        return (scaled.T, p) if narrow else (p.T, scaled)
