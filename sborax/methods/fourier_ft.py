"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv:2405.03003."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sborax.adapters.core import AbstractAdditive, Adapter, Axes, Context, Fitted, Hint, Weight, hyper
from sborax.methods.places import check_places, start_at_places, times_sparse


@dataclasses.dataclass(frozen=True)
class FourierFT(AbstractAdditive):
    """y = x W + s x F, where F[i, j] = sum_k c_k cos(2 pi (p_k i / in + q_k j / out)) / (in out).

    F is the real part of the inverse Fourier transform of a sparse spectrum with the entries c_k at (p_k, q_k). It is
    never formed: x is transformed, its entry at p_k times c_k is added at q_k, and the result is transformed back.

    coefficients: how many coefficients c_k are trained (PEFT: 1000).
    alpha: the scale s (PEFT: 150).
    seed: the seed of the places (p_k, q_k), which are the same for all kernels of a shape (PEFT: 777). They are drawn
        as PyTorch draws them, since PEFT's files do not hold them, and kept with the adapter.

    c = 0 at init: identity. (Paper and PEFT draw it from N(0, 1) unless told otherwise.) Exact merge. The transforms
    run in float32. Trained parameters: coefficients.
    """

    paper = "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv:2405.03003"
    group_b = frozenset({"c"})
    sends = "transforms of x and of the gradient in y, which the compiler does not cut"
    rank = 1

    coefficients: int = 1000
    alpha: float = hyper(150.0, above=0.0)
    seed: int = 777

    @property
    def axes(self) -> Axes:
        return {"c": (None,), "idx": (None, None), "scale": ()}

    def check(self, shape: tuple[int, int]) -> None:
        check_places(self.seed, self.coefficients, shape)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        return start_at_places(self.seed, self.coefficients, weight.shape, self.alpha)

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        fan_in, fan_out = x.shape[1], y.shape[1]
        columns, rows = adapter.frozen["idx"]
        # Spectra of real signals are symmetric, so one half of each is enough.
        q, q_mirrored = _half(columns, fan_out)
        p, p_mirrored = _half(rows, fan_in)
        gain = adapter.frozen["scale"] * adapter.train["c"] / fan_in
        # Coefficients between the ends stand for their mirror images, too.
        gain = jnp.where((q == 0) | (2 * q == fan_out), gain, 0.5 * gain)
        spectrum = jnp.fft.rfft(x.astype(jnp.float32))
        width = fan_out // 2 + 1
        imaginary_gain = jnp.where(p_mirrored == q_mirrored, -gain, gain)
        real = times_sparse(jnp.real(spectrum), p, q, gain, width)
        imaginary = times_sparse(jnp.imag(spectrum), p, q, imaginary_gain, width)
        mixed = jax.lax.complex(real, imaginary)
        return y + jnp.fft.irfft(mixed, n=fan_out).astype(y.dtype)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        columns, rows = adapter.frozen["idx"]
        spectrum = jnp.zeros(weight.shape).at[rows, columns].set(adapter.train["c"], unique_indices=True)
        return weight + adapter.frozen["scale"] * jnp.real(jnp.fft.ifft2(spectrum))


def _half(places: Int[Array, " k"], size: int) -> tuple[Int[Array, " k"], Bool[Array, " k"]]:
    """Places in the lower half of a spectrum, and whether they are mirror images of the given ones."""
    mirrored = 2 * places > size
    return jnp.where(mirrored, size - places, places), mirrored
