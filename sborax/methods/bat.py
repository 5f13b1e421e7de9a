"""Bat: block affine transformation guided by the weight, arXiv:2409.15371 (there "Bone" until v3)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractMethod,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    SboraxError,
    Weight,
    cast,
    check_rank,
    dense,
)


@dataclasses.dataclass(frozen=True)
class Bat(AbstractMethod):
    """Every (rank, rank) block of W is multiplied by and shifted by a matrix that its block column shares.

    In torch's (out, in) layout W'_om = W_om (I + d_o) + d_o, d (out/rank, rank, rank); in ours
    W'[m q, o p] = W[m q, o p] + sum_j W[m j, o p] d[o, j, q] + d[o, p, q]   (PEFT's MISS "bat", block columns).

    rank: block size; it must divide both in and out (authors: 64).

    d = 0 at init: identity. Exact merge. The step forms W': the change is of full rank. Trained parameters: rank out.
    """

    paper = "Bone: Block-Affine Adaptation of Large Language Models, arXiv:2409.15371"
    materialises = "the update multiplies the weight, so it has no thin form"

    rank: int = 64

    @property
    def axes(self) -> Axes:
        return {"d": ("out", None, None)}

    def check(self, shape: tuple[int, int]) -> None:
        check_rank(self.rank, min(shape), "the smaller side")
        if shape[0] % self.rank or shape[1] % self.rank:
            raise SboraxError(f"the block size {self.rank} must divide both sides")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        return Fitted({"d": jnp.zeros((weight.shape[1] // self.rank, self.rank, self.rank))}, {})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return x @ self._transform(cast(dense(weight), x), cast(adapter.train["d"], x))

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        return self._transform(dense(weight).astype(jnp.float32), adapter.train["d"])

    def _transform(self, w: Float[Array, "in out"], d: Float[Array, "blocks r r"]) -> Float[Array, "in out"]:
        fan_in, fan_out = w.shape
        r = self.rank
        blocks = w.reshape(fan_in // r, r, fan_out // r, r)
        change = jnp.einsum("mjop,ojq->mqop", blocks, d) + d.transpose(2, 0, 1)[None]
        return w + change.reshape(fan_in, fan_out)
