"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, arXiv:2505.12532."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

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
    hyper,
)
from sborax.methods.places import check_places, start_at_places, times_sparse


@dataclasses.dataclass(frozen=True)
class WaveFT(AbstractAdditive):
    """y = x W + s x F, where F is one level of the inverse wavelet transform of a matrix C with few trained entries.

    With Haar's wavelet, entry (p, q) of C adds 1/2 times itself to a block of two rows and two columns of F. Signs
    alternate along its rows if q is in the second half of the columns, and along its columns if p is in that of the
    rows, as in PEFT. F is never formed: x is transformed, its entry at p times that of C is added at q, and the result
    is transformed back.

    coefficients: how many entries of C are trained (PEFT: 2592).
    alpha: the scale s (PEFT: 25).
    wavelet: "haar" (default; PEFT's "db1"), or None for F = C (PEFT's use_idwt=False).
    seed: the seed of the places (p, q), which are the same for all kernels of a shape (PEFT: 777). They are drawn as
        PyTorch draws them, since PEFT's files do not hold them, and kept with the adapter.

    C = 0 at init: identity. Exact merge. Trained parameters: coefficients.
    """

    paper = "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets, arXiv:2505.12532"
    group_b = frozenset({"c"})
    sends = "x and the gradient in y, whose entries at random places meet"
    rank = 1

    coefficients: int = 2592
    alpha: float = hyper(25.0, above=0.0)
    wavelet: Literal["haar"] | None = "haar"
    seed: int = 777

    @property
    def axes(self) -> Axes:
        return {"c": (None,), "idx": (None, None), "scale": ()}

    def check(self, shape: tuple[int, int]) -> None:
        if self.wavelet not in ("haar", None):
            raise SboraxError(f"wavelet must be 'haar' or None, got {self.wavelet!r}")
        check_places(self.seed, self.coefficients, shape)

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        return start_at_places(self.seed, self.coefficients, weight.shape, self.alpha)

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        columns, rows = self._moves(adapter, (x.shape[1], y.shape[1]))
        gain = cast(adapter.frozen["scale"] * adapter.train["c"], x)
        transformed = x if self.wavelet is None else _transform(x)
        mixed = times_sparse(transformed, rows, columns, gain, self._width(y.shape[1]))
        return y + (mixed if self.wavelet is None else _inverse(mixed)[:, : y.shape[1]])

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        fan_in, fan_out = weight.shape
        columns, rows = self._moves(adapter, (fan_in, fan_out))
        values = adapter.frozen["scale"] * adapter.train["c"]
        if self.wavelet is None:
            return weight.at[rows, columns].add(values, unique_indices=True)
        sparse = jnp.zeros((self._width(fan_in), self._width(fan_out)))
        sparse = sparse.at[rows, columns].set(values, unique_indices=True)
        return weight + _inverse(_inverse(sparse)[:, :fan_out].T)[:, :fan_in].T

    def _moves(self, adapter: Adapter, shape: tuple[int, int]) -> tuple[Int[Array, " k"], Int[Array, " k"]]:
        """For each entry of C: the column of y's transform that it adds to, and the column of x's that it reads."""
        columns, rows = adapter.frozen["idx"]
        if self.wavelet is None:
            return columns, rows
        half_in, half_out = (self._width(size) // 2 for size in shape)
        return (
            columns % half_out + jnp.where(rows >= half_in, half_out, 0),
            rows % half_in + jnp.where(columns >= half_out, half_in, 0),
        )

    def _width(self, size: int) -> int:
        """The columns of a transform of so many: an even number."""
        return size if self.wavelet is None else size + size % 2


def _transform(x: Float[Array, "rows n"]) -> Float[Array, "rows even"]:
    """Haar's transform of every row: sums of neighbours, then their differences. A zero is added to odd rows."""
    pairs = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2))).reshape(x.shape[0], (x.shape[1] + 1) // 2, 2)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    return jnp.concatenate([first + second, first - second], axis=1) * 0.5**0.5


def _inverse(z: Float[Array, "rows even"]) -> Float[Array, "rows even"]:
    """The inverse of `_transform`, which is also its transpose."""
    sums, differences = jnp.split(z, 2, axis=1)
    return jnp.stack([sums + differences, sums - differences], axis=2).reshape(z.shape) * 0.5**0.5
