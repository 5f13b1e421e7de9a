"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv:2407.19342."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sborax.adapters.core import AbstractAdditive, Adapter, Axes, Context, Fitted, Hint, SboraxError, Weight


@dataclasses.dataclass(frozen=True)
class C3A(AbstractAdditive):
    """y = x W + x C / in, where every (block, block) block of C is circulant: C_nm[u, s] = w[n, m, (u - s) mod block].

    Computed with real Fourier transforms of length block: Y_m = sum_n X_n conj(W_nm). C is never formed.

    block: size of a circulant block; it must divide both in and out (PEFT: 256).

    w (in/block, out/block, block) = 0 at init: identity. (PEFT draws it at random unless told otherwise.)
    Exact merge. The transforms run in float32. Trained parameters: in out / block.
    """

    paper = "Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv:2407.19342"
    sends = "transforms of x and of the gradient in y, which the compiler does not cut"
    rank = 1

    block: int = 256

    @property
    def axes(self) -> Axes:
        return {"w": ("in", "out", None)}

    def check(self, shape: tuple[int, int]) -> None:
        if self.block < 1 or shape[0] % self.block or shape[1] % self.block:
            raise SboraxError(f"the block size {self.block} must divide both sides")

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        fan_in, fan_out = weight.shape
        return Fitted({"w": jnp.zeros((fan_in // self.block, fan_out // self.block, self.block))}, {})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        signal = jnp.fft.rfft(x.astype(jnp.float32).reshape(x.shape[0], x.shape[1] // self.block, self.block))
        kernel = jnp.conj(jnp.fft.rfft(adapter.train["w"] / x.shape[1]))
        mixed = jnp.fft.irfft(jnp.einsum("tnf,nmf->tmf", signal, kernel), n=self.block)
        return y + mixed.reshape(y.shape).astype(y.dtype)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        place = jnp.arange(self.block)
        blocks = adapter.train["w"][:, :, (place[:, None] - place[None, :]) % self.block]
        return weight + blocks.transpose(0, 2, 1, 3).reshape(weight.shape) / weight.shape[0]
