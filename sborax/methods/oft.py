"""OFT: orthogonal fine-tuning, arXiv:2306.07280, in the input-centric form of OFTv2, arXiv:2506.19847."""

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
    dense,
    matmul,
)
from sborax.methods.rotation import rotations


@dataclasses.dataclass(frozen=True)
class OFT(AbstractMethod):
    """y = (x R) W, where R is block-diagonal with blocks rotated by skew-symmetric matrices Q (block, block).

    terms=t: R = I + 2 Q + ... + 2 Q^(t-2) + Q^(t-1), the Neumann series of (I + Q)(I - Q)^-1 (PEFT's default).
    terms=None: R = (I - Q)(I + Q)^-1, exactly orthogonal; PEFT's exact form rotates the other way round.

    block: size of a block, which must divide in (PEFT: 32).
    terms: length of the series, at least 4 (PEFT: 5), or None.
    share: one block for all of them; default False.

    Trained are the entries of Q above the diagonal, row by row. Q = 0 at init: identity. Exact merge R W.
    x is rotated, never W. Trained parameters: in (block - 1) / 2, or block (block - 1) / 2 if shared.
    """

    paper = "Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv:2306.07280"
    sends = "the rotations of all blocks, and x, for blocks are cut in another way than tokens"
    rank = 1

    block: int = 32
    terms: int | None = 5
    share: bool = False

    @property
    def axes(self) -> Axes:
        return {"q": (None if self.share else "in", None)}

    def check(self, shape: tuple[int, int]) -> None:
        if self.block < 2 or shape[0] % self.block:
            raise SboraxError(f"block must be at least 2 and divide {shape[0]} rows, got {self.block}")
        if self.terms is not None and self.terms < 4:
            raise SboraxError(f"terms must be None or at least 4, got {self.terms}")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        blocks = 1 if self.share else weight.shape[0] // self.block
        return Fitted({"q": jnp.zeros((blocks, self.block * (self.block - 1) // 2))}, {})

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        r = cast(self._rotations(adapter.train["q"], x.shape[1]), x)
        turned = jnp.einsum("tnk,nkc->tnc", x.reshape(x.shape[0], -1, self.block), r)
        return matmul(turned.reshape(x.shape), weight)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        wide = dense(weight).astype(jnp.float32)
        r = self._rotations(adapter.train["q"], wide.shape[0])
        turned = jnp.einsum("nkc,nco->nko", r, wide.reshape(-1, self.block, wide.shape[1]), precision="highest")
        return turned.reshape(wide.shape)

    def _rotations(self, q: Float[Array, "blocks upper"], fan_in: int) -> Float[Array, "n block block"]:
        r = rotations(q, self.block, self.terms)
        return jnp.broadcast_to(r, (fan_in // self.block, self.block, self.block))
