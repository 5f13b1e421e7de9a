"""4-bit NormalFloat weights with double quantisation (QLoRA, arXiv 2305.14314), equal to bitsandbytes bit for bit.

A weight is cut into blocks of 64 along its input axis. Each block keeps 4-bit codes of w / absmax; the absmax of
256 consecutive blocks share a second scale and keep 8-bit codes. That is 0.5 + 1/64 + 4/16384 bytes a parameter.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped, UInt8

from sborax.adapters.constraints import cut, replicate
from sborax.adapters.core import AbstractWeight, SboraxError
from sborax.adapters.weight import check_finite

BLOCK = 64
"""Weights that share one absmax."""
GROUP = 256
"""Absmax values that share one nested absmax."""
# The quantiles of the normal distribution as bitsandbytes stores them; QLoRA, appendix E.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
MIDPOINTS = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
# Elements of a chunk on the host: bounds the float32 copies of `quantise_numpy`.
_CHUNK = 1 << 16
# The smallest divisor of bitsandbytes. It is subnormal, which numpy does not flush to 0.
_LEAST = np.float32(1e-38)


@functools.cache
def dynamic_map() -> Float32[np.ndarray, "256"]:
    """The sorted 8-bit "dynamic exponent" code of bitsandbytes (arXiv 1511.04561), in [-0.993, 1]."""
    values = [0.0, 1.0]
    for exponent in range(7):
        # torch.linspace in float32: from both ends towards the middle, each element rounded once.
        last = 2**exponent
        index = np.arange(last + 1)
        start, step = np.float32(0.1), float(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(last)))
        edges = np.where(index < (last + 1) // 2, float(start) + step * index, 1.0 - step * (last - index))
        edges = edges.astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        values += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(values, np.float32))


@functools.cache
def _dynamic_thresholds() -> Float32[np.ndarray, "255"]:
    """Entry k is the least float32 in [-1, 1] that bitsandbytes gives a code above k.

    bitsandbytes looks codes up in 65,536 bins, at bin int(fma((v + 1) / 2, 65535, 1/2)). That is a step function of v.
    Its steps give the same codes, however a compiler contracts the multiply and the add.
    """
    codes = dynamic_map()
    centres = np.arange(65536).astype(np.float32) * np.float32(2) / np.float32(65535) - np.float32(1)
    table = np.searchsorted((codes[:-1] + codes[1:]) * np.float32(0.5), centres, side="left")
    first_bin = np.searchsorted(table, np.arange(255), side="right")

    def bin_of(value: np.ndarray) -> np.ndarray:
        half = (value + np.float32(1)).astype(np.float64) * 0.5
        return (half * 65535 + 0.5).astype(np.float32).astype(np.int64)

    # Bisect over float32 values by their rank: rank r stands for the r-th float above (below) zero.
    def value_of(rank: np.ndarray) -> np.ndarray:
        return np.copysign(np.abs(rank).astype(np.int32).view(np.float32), rank).astype(np.float32)

    top = int(np.float32(1).view(np.int32))
    low, high = np.full(255, -top - 1, np.int64), np.full(255, top, np.int64)
    while (high - low > 1).any():
        middle = (low + high) // 2
        reached = bin_of(value_of(middle)) >= first_bin
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return value_of(high)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4Array(AbstractWeight):
    """An NF4 weight of logical shape `(*stack, in, out)`. Slicing every leaf on its stack axes gives an NF4 weight.

    - codes: uint8 `(*stack, in / 2, out)`. Row i holds input 2i in the high nibble and input 2i + 1 in the low one.
    - absmax: uint8 `(*stack, in / 64, out)`. Codes of the blocks' absmax less `offset`, in units of `nested`.
    - nested: float32 `(*stack, ceil(in * out / 16384))`. Scales of 256 blocks each, numbered along `in` first.
    - offset: float32 `stack`. The mean absmax.
    - dtype: logical dtype, that of `dense`.
    - axes: of the mesh, along which the input and the output stay cut where the weight is used; None for any.
    """

    codes: Any
    absmax: Any
    nested: Any
    offset: Any
    dtype: Any = dataclasses.field(metadata={"static": True})
    axes: tuple[str | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, half, out = self.codes.shape
        return (*stack, 2 * half, out)

    def dense(self) -> Float[Array, "*stack in out"]:
        """w = level[code] * (nested * dynamic[absmax code] + offset), rounded once to `dtype`.

        Raises SboraxError if the leaves are one shard of a weight.
        """
        dequantise, codes, absmax = _dequantise, self.codes, self.absmax
        if self.axes is not None:
            # A code takes 4 bits of what its weight takes when it is sent.
            stack = (None,) * len(self.shape[:-2])
            codes, absmax = (cut(leaf, *stack, *self.axes) for leaf in (codes, absmax))
        for _ in self.shape[:-2]:
            dequantise = jax.vmap(dequantise)
        return dequantise(codes, absmax, self.nested, self.offset).astype(self.dtype)

    def rmatmul(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        """`x @ dense()` in the dtype of `x`. Backward dequantises again: neither `x` nor a dense weight is kept."""
        return _rmatmul(x, self)

    def encode(self, dense: Float[Array, "*stack in out"]) -> "NF4Array":
        """`dense` quantised, with the logical dtype of this weight."""
        return dataclasses.replace(quantise(dense), dtype=self.dtype)

    def stored(self) -> "NF4Array":
        """The weight itself."""
        return self

    def cut_along(self, *axes: str | None) -> "NF4Array":
        """The weight whose codes are gathered before they are dequantised."""
        return dataclasses.replace(self, axes=axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unquantised(AbstractWeight):
    """A dense weight that will be held in NF4: methods start from its values, and what they leave is quantised."""

    weight: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return self.weight.dtype

    def dense(self) -> Float[Array, "*stack in out"]:
        """The weight."""
        return self.weight

    def rmatmul(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        """`x @ dense()` in the dtype of `x`."""
        return x @ self.weight.astype(x.dtype)

    def encode(self, dense: Float[Array, "*stack in out"]) -> NF4Array:
        """`dense` in the dtype of this weight, quantised."""
        info = jnp.finfo(self.dtype)
        # The compiler would leave out a plain cast there and back.
        return quantise(lax.reduce_precision(dense, info.nexp, info.nmant).astype(self.dtype))

    def stored(self) -> NF4Array:
        """The weight, quantised."""
        return quantise(self.weight)

    def cut_along(self, *axes: str | None) -> "Unquantised":
        """The weight itself: it is dense."""
        return self


def _scales(
    absmax: UInt8[Array, "blocks out"], nested: Float32[Array, " groups"], offset: Float32[Array, ""]
) -> Float32[Array, "blocks out"]:
    """The absmax of every block."""
    blocks, out = absmax.shape
    if nested.shape != (-(-blocks * out // GROUP),):
        raise SboraxError(
            f"an NF4 weight with {blocks * out} blocks needs {-(-blocks * out // GROUP)} nested scales, "
            f"got {nested.shape}: dequantise whole weights, not the shards inside a shard_map"
        )
    unit = jnp.broadcast_to(nested[:, None], (*nested.shape, GROUP)).reshape(-1)[: blocks * out].reshape(out, blocks).T
    product = look_up(dynamic_map(), absmax) * unit
    # No code exceeds 1, so the minimum changes no value. It keeps the compiler from rounding product and sum once,
    # where bitsandbytes rounds twice.
    return jnp.minimum(product, unit) + offset


def _dequantise(
    codes: UInt8[Array, "half out"],
    absmax: UInt8[Array, "blocks out"],
    nested: Float32[Array, " groups"],
    offset: Float32[Array, ""],
) -> Float32[Array, "in out"]:
    half, out = codes.shape
    nibbles = (codes[:, None, :] >> jnp.array([4, 0], jnp.uint8)[None, :, None]) & jnp.uint8(15)
    levels = look_up(LEVELS, nibbles.reshape(-1, BLOCK, out))
    return (levels * _scales(absmax, nested, offset)[:, None, :]).reshape(2 * half, out)


def look_up(table: Float32[np.ndarray, " codes"], codes: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """`table[codes]`, for codes within a table whose length is a power of 2.

    A TPU gathers single numbers through its main memory, one at a time. There, selects take the place of the gather.
    """
    return lax.platform_dependent(
        codes, tpu=functools.partial(_selected, table), default=functools.partial(_gathered, table)
    )


def _gathered(table: Float32[np.ndarray, " codes"], codes: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def _selected(table: Float32[np.ndarray, " codes"], codes: UInt8[Array, "*shape"]) -> Float32[Array, "*shape"]:
    entries: list[Any] = list(table)
    bits = codes.astype(jnp.int32)
    while len(entries) > 1:
        is_odd = (bits & 1) == 1
        entries = [jnp.where(is_odd, odd, even) for even, odd in zip(entries[::2], entries[1::2], strict=True)]
        bits = bits >> 1
    return entries[0]


@jax.custom_vjp
def _rmatmul(x: Float[Array, "tokens in"], weight: NF4Array) -> Float[Array, "tokens out"]:
    return x @ weight.dense().astype(x.dtype)


def _rmatmul_forward(x: Float[Array, "tokens in"], weight: NF4Array) -> tuple[Float[Array, "tokens out"], NF4Array]:
    return _rmatmul(x, weight), weight


def _rmatmul_backward(weight: NF4Array, g: Float[Array, "tokens out"]) -> tuple[Float[Array, "tokens in"], None]:
    # Without the barrier the compiler would keep the equal dense weight of the forward pass until here.
    weight, g = lax.optimization_barrier((weight, g))
    return g @ weight.dense().astype(g.dtype).T, None


_rmatmul.defvjp(_rmatmul_forward, _rmatmul_backward)


def check(shape: tuple[int, ...], dtype: Any) -> None:
    """Raise SboraxError unless NF4 can hold a weight of this shape and dtype."""
    if len(shape) < 2 or shape[-2] % BLOCK or 0 in shape:
        raise SboraxError(
            f"NF4 cuts the input axis into blocks of {BLOCK}, which a weight of shape (..., in, out) = {shape} does "
            "not allow: keep this weight dense"
        )
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.dtype(dtype).itemsize > 4:
        raise SboraxError(f"NF4 holds float32, bfloat16 or float16 weights, got {jnp.dtype(dtype)}: cast it first")


def _encode(xp: ModuleType, weight: Any, least: np.float32) -> tuple[Any, Any]:
    """Packed codes `(in / 2, out)` and float32 absmax `(in / 64, out)` of one weight, in numpy or jax.numpy."""
    size, out = weight.shape
    blocks = weight.astype(np.float32).reshape(size // BLOCK, BLOCK, out)
    absmax = xp.abs(blocks).max(axis=1)
    scaled = blocks * (np.float32(1) / xp.maximum(absmax, least))[:, None, :]
    # The code is the number of midpoints below, so a tie goes to the lower level.
    codes = xp.zeros(scaled.shape, np.uint8)
    for midpoint in MIDPOINTS:
        codes = codes + (scaled > midpoint).astype(np.uint8)
    pairs = codes.reshape(size // 2, 2, out)
    return (pairs[:, 0] << np.uint8(4)) | pairs[:, 1], absmax


def _nest(xp: ModuleType, absmax: Any, offset: Any, least: np.float32) -> tuple[Any, Any]:
    """8-bit codes `(blocks, out)` of the absmax less its mean, and the nested absmax `(groups,)`."""
    blocks, out = absmax.shape
    # bitsandbytes numbers blocks along a row of torch's (out, in) weight.
    flat = (absmax - offset).T.reshape(-1)
    groups = xp.pad(flat, (0, -flat.size % GROUP)).reshape(-1, GROUP)
    nested = xp.abs(groups).max(axis=1)
    scaled = groups * (np.float32(1) / xp.maximum(nested, least))[:, None]
    codes = xp.searchsorted(xp.asarray(_dynamic_thresholds()), scaled, side="right").astype(np.uint8)
    codes = xp.where((nested > 0)[:, None], codes, np.uint8(0))
    return codes.reshape(-1)[: flat.size].reshape(out, blocks).T, nested


def _mean(values: Float32[Array, "blocks out"]) -> Float32[Array, ""]:
    """The mean. The sum carries the rounding error of every addition along, so that it is rounded once."""

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        total = left[0] + right[0]
        part = total - left[0]
        error = (left[0] - (total - part)) + (right[0] - part)
        return total, left[1] + right[1] + error

    zero = np.float32(0)
    high, low = lax.reduce((values, jnp.zeros_like(values)), (zero, zero), add, (0, 1))
    # A constant divisor would become a multiplication by its rounded reciprocal.
    return (high + low) / lax.optimization_barrier(jnp.float32(values.size))


def quantise(weight: Shaped[Array, "..."] | Shaped[np.ndarray, "..."]) -> NF4Array:
    """NF4 codes of a weight `(*stack, in, out)`, one layer of the stack at a time.

    w = level[code] * absmax with the nearest of 16 levels by float32 midpoints, ties to the lower; blocks of 64 along
    `in`; absmax less its mean coded in 8 bits in groups of 256. Equal to bitsandbytes' CPU `quantize_4bit(weight.T,
    blocksize=64, compress_statistics=True, quant_type="nf4")`, given its `offset`: ours is the mean to the last bit,
    while torch sums in float32, in an order that depends on its threads. XLA may flush subnormals, so equality needs
    weights that are 0 or of magnitude 1e-36 to 1e37.

    Raises SboraxError if `in` is not a multiple of 64 (bitsandbytes would let blocks run across outputs there), if the
    weight is not of floats of at most 32 bits, or if it is not finite, since one value would spoil all others through
    the scales. Inside a compiled program values are not known, so there the caller must check that they are finite.
    """
    check(weight.shape, weight.dtype)
    check_finite(f"a weight of shape {weight.shape}", weight)
    return _quantise(weight)


@jax.jit
def _quantise(weight: Shaped[Array, "..."]) -> NF4Array:
    least = np.finfo(np.float32).tiny

    def encode(matrix: Float[Array, "in out"]) -> tuple[Array, ...]:
        codes, absmax = _encode(jnp, replicate(matrix), least)
        return codes, *_nested(absmax)

    return NF4Array(*_over_stack(encode, weight), dtype=jnp.dtype(weight.dtype))


def _over_stack(function: Callable[[Any], tuple[Array, ...]], matrices: Any) -> tuple[Array, ...]:
    """`function` of every matrix of a stack, in turn."""
    stack = matrices.shape[:-2]
    if not stack:
        return function(matrices)
    leaves = lax.map(function, matrices.reshape(-1, *matrices.shape[-2:]))
    return tuple(leaf.reshape(*stack, *leaf.shape[1:]) for leaf in leaves)


def _nested(absmax: Float32[Array, "blocks out"]) -> tuple[Array, ...]:
    """The leaves `absmax`, `nested` and `offset` of one weight."""
    offset = _mean(absmax)
    return *_nest(jnp, absmax, offset, np.finfo(np.float32).tiny), offset


@jax.jit
def _all_nested(absmax: Float32[Array, "*stack blocks out"]) -> tuple[Array, ...]:
    return _over_stack(lambda matrix: _nested(replicate(matrix)), absmax)


def join(codes: UInt8[Array, "*stack half out"], absmax: Float32[Array, "*stack blocks out"], dtype: Any) -> NF4Array:
    """The weight with the blocks that `encode_blocks` made. On a mesh they may lie anywhere."""
    return NF4Array(codes, *_all_nested(absmax), dtype=jnp.dtype(dtype))


def quantise_numpy(weight: Shaped[np.ndarray, "..."]) -> NF4Array:
    """`quantise` on the host, with numpy leaves. Nothing is compiled, and temporaries take a few MiB.

    Equal to bitsandbytes for subnormal weights too. A transposed view of a torch-ordered array is read in place.
    Raises SboraxError as `quantise` does.
    """
    check(weight.shape, weight.dtype)
    if weight.ndim > 2:
        layers = [quantise_numpy(layer) for layer in weight]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    codes, absmax = encode_blocks(weight)
    offset = np.float32(absmax.sum(dtype=np.float64)) / np.float32(absmax.size)
    return NF4Array(codes, *_nest(np, absmax, offset, _LEAST), np.asarray(offset), dtype=jnp.dtype(weight.dtype))


def encode_blocks(
    weight: Shaped[np.ndarray, "in out"],
) -> tuple[UInt8[np.ndarray, "half out"], Float32[np.ndarray, "blocks out"]]:
    """Codes and absmax of a weight, or of a part of one with whole blocks, on the host. Blocks are independent.

    Raises SboraxError for weights that are not finite.
    """
    size, out = weight.shape
    codes, absmax = np.empty((size // 2, out), np.uint8), np.empty((size // BLOCK, out), np.float32)
    width = max(1, _CHUNK // size)
    for start in range(0, out, width):
        part = slice(start, start + width)
        if not np.isfinite(weight[:, part]).all():
            raise SboraxError(f"a weight of shape {weight.shape} holds values that are not finite: fix the checkpoint")
        codes[:, part], absmax[:, part] = _encode(np, weight[:, part], _LEAST)
    return codes, absmax
