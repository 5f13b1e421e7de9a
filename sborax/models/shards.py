"""Arrays read from files straight into the shards of this process's devices."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from sborax.adapters.core import AbstractWeight, SboraxError
from sborax.models.nf4 import BLOCK, NF4Array, encode_blocks, join

Region = tuple[slice, ...]
_ALIGNMENT = 64


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array that is aligned so that JAX on a CPU adopts it without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _region(index: Iterable[slice], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (part.start or 0, size if part.stop is None else part.stop) for part, size in zip(index, shape, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Shards:
    """The parts of an array that this process's devices hold. A part is kept once, however many devices hold it."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: dict[tuple[tuple[int, int], ...], np.ndarray]

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> "Shards":
        """Empty parts."""
        regions = {_region(index, shape) for index in sharding.addressable_devices_indices_map(shape).values() if index}
        sizes = {region: tuple(stop - start for start, stop in region) for region in regions}
        return cls(shape, sharding, {region: aligned(size, dtype) for region, size in sizes.items()})

    def slots(self, place: tuple[int, ...]) -> list[tuple[Region, np.ndarray]]:
        """The region of every part and the buffer for it, at a place in the leading axes; () for the whole array."""
        slots, axes = [], len(place)
        for region, part in self.parts.items():
            if all(start <= number < stop for number, (start, stop) in zip(place, region[:axes], strict=True)):
                within = tuple(number - start for number, (start, _) in zip(place, region[:axes], strict=True))
                slots.append((tuple(slice(*bounds) for bounds in region[axes:]), part[within]))
        return slots

    def array(self) -> jax.Array:
        """The array, across all processes."""
        return jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.parts[_region(index or (), self.shape)]
        )


def read_sharded(tensors: Iterable[tuple[tuple[int, ...], tuple[str, np.ndarray]]], want: Any, where: Any) -> Any:
    """An array read from tensors. Each process reads the regions that its devices hold.

    - tensors: pairs of the place in the stack, () without a stack, and (name, tensor).
    - want: shape and dtype of the array.
    - where: its sharding, or for a weight in 4 bits the shardings of an `NF4Array`. Each process quantises the blocks
      that it holds.

    Raises SboraxError for a weight in 4 bits that is not finite.
    """
    if isinstance(where, AbstractWeight):
        return _read_nf4(tensors, want, where)
    shards = Shards.of(want.shape, want.dtype, where)
    for place, (_, tensor) in tensors:
        for region, part in shards.slots(place):
            part[...] = tensor[region]
    return shards.array()


def _read_nf4(tensors: Iterable[tuple[tuple[int, ...], tuple[str, np.ndarray]]], want: Any, where: Any) -> NF4Array:
    *stack, size, out = want.shape
    codes = Shards.of((*stack, size // 2, out), np.uint8, where.codes)
    # Codes and absmax of a matrix are cut into the same whole blocks.
    absmax = Shards.of((*stack, size // BLOCK, out), np.float32, where.absmax)
    for place, (name, tensor) in tensors:
        scales = {(rows.start * BLOCK, columns.start): part for (rows, columns), part in absmax.slots(place)}
        for (rows, columns), part in codes.slots(place):
            blocks = tensor[2 * rows.start : 2 * rows.stop, columns].astype(want.dtype, copy=False)
            try:
                part[...], scales[2 * rows.start, columns.start][...] = encode_blocks(blocks)
            except SboraxError as error:
                raise SboraxError(f"quant: {name}: {error}") from None
    return jax.device_put(join(codes.array(), absmax.array(), want.dtype), where)
