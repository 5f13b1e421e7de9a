"""OFT: orthogonal fine-tuning, arXiv:2306.07280, in the input-centric form of OFTv2, arXiv:2506.19847."""

import dataclasses

import jax
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
    check_repetitions,
    dense,
    hyper,
    matmul,
)
from sborax.methods.rotation import rotations


@dataclasses.dataclass(frozen=True)
class OFT(AbstractMethod):
    """y = (x R) W, where R is block-diagonal: each block is a rotation made from a skew-symmetric Q (block, block).

    terms=t: R = I + 2 Q + ... + 2 Q^(t-2) + Q^(t-1), the Neumann series of (I + Q)(I - Q)^-1 (PEFT's default).
    terms=2: R = I + 2 Q, the shortest that PEFT has.
    terms=None: R = (I - Q)(I + Q)^-1, exactly orthogonal; PEFT's exact form rotates the other way round.

    block: size of a block, which must divide in (PEFT: 32).
    terms: length of the series, 2 or at least 4 (PEFT: 5), or None.
    share: one Q for all blocks; default False.
    eps: COFT, rotations that stay near the identity: a Q whose Frobenius norm is above eps / sqrt(number of Qs) is
        scaled down to that norm (PEFT's `coft=True`, 6e-5). None (default) sets no bound.

    With eps, gradients are those at the scaled Q, as in PEFT. PEFT writes the scaled Q into the trained leaf at every
    call; here the leaf stays as it is. So training agrees with PEFT until a Q is first scaled. Scores always agree.

    Trained are the entries of Q above the diagonal, row by row. Q = 0 at init: identity. Exact merge R W.
    x is rotated, never W. Trained parameters: in (block - 1) / 2, or block (block - 1) / 2 if shared.
    """

    paper = "Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv:2306.07280"
    sends = "the rotations of all blocks, and x, for blocks are cut in another way than tokens"
    rank = 1

    block: int = 32
    terms: int | None = 5
    share: bool = False
    eps: float | None = hyper(None, above=0.0)

    @property
    def axes(self) -> Axes:
        return {"q": (None if self.share else "in", None), "eps": ()}

    def check(self, shape: tuple[int, int]) -> None:
        if self.block < 2 or shape[0] % self.block:
            raise SboraxError(f"block must be at least 2 and divide {shape[0]} rows, got {self.block}")
        if self.terms is not None and self.terms != 2 and self.terms < 4:
            raise SboraxError(f"terms must be None, 2 or at least 4, got {self.terms}")
        check_repetitions("terms", self.terms, 2)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        blocks = 1 if self.share else weight.shape[0] // self.block
        bound = {} if self.eps is None else {"eps": jnp.float32(self.eps)}
        return Fitted({"q": jnp.zeros((blocks, self.block * (self.block - 1) // 2))}, bound)

    def apply(
        self, x: Float[Array, "tokens in"], weight: Weight, adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        r = cast(self._rotations(adapter, x.shape[1]), x)
        rotated = jnp.einsum("tnk,nkc->tnc", x.reshape(x.shape[0], x.shape[1] // self.block, self.block), r)
        return matmul(rotated.reshape(x.shape), weight)

    def merge(self, weight: Weight, adapter: Adapter) -> Float[Array, "in out"]:
        wide = dense(weight).astype(jnp.float32)
        r = self._rotations(adapter, wide.shape[0])
        rotated = jnp.einsum("nkc,nco->nko", r, wide.reshape(-1, self.block, wide.shape[1]), precision="highest")
        return rotated.reshape(wide.shape)

    def _rotations(self, adapter: Adapter, fan_in: int) -> Float[Array, "n block block"]:
        q = adapter.train["q"]
        if "eps" in adapter.frozen:
            q = _scaled_down(q, adapter.frozen["eps"])
        r = rotations(q, self.block, self.terms)
        return jnp.broadcast_to(r, (fan_in // self.block, self.block, self.block))


def _scaled_down(q: Float[Array, "blocks upper"], eps: Float[Array, ""]) -> Float[Array, "blocks upper"]:
    """q, where the norm of Q is above eps / sqrt(blocks) scaled down to that; the gradient is passed on as it is."""
    constant = jax.lax.stop_gradient(q)
    norms = jnp.sqrt(2.0) * jnp.linalg.norm(constant, axis=1, keepdims=True)
    bound = eps / jnp.sqrt(jnp.float32(q.shape[0]))
    # The difference is zero, but its gradient is not.
    return jnp.where(norms > bound, constant * (bound / jnp.maximum(norms, bound)), constant) + (q - constant)
