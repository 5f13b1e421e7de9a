"""Arrays read from files straight into the shards that the devices of this process hold."""

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
    """An array so aligned that a CPU device takes it over as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _region(index: Iterable[slice], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(
        (own.start or 0, size if own.stop is None else own.stop) for own, size in zip(index, shape, strict=True)
    )


@dataclasses.dataclass(frozen=True)
class Shards:
    """What the devices of this process hold of an array: every part once, however many devices have it."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: dict[tuple[tuple[int, int], ...], np.ndarray]

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> "Shards":
        """Room for the parts."""
        regions = {_region(index, shape) for index in sharding.addressable_devices_indices_map(shape).values() if index}
        sizes = {region: tuple(stop - start for start, stop in region) for region in regions}
        return cls(shape, sharding, {region: aligned(size, dtype) for region, size in sizes.items()})

    def slots(self, layer: int | None) -> list[tuple[Region, np.ndarray]]:
        """For every part, where it lies in a layer of the stack (None: in the array) and the room for it."""
        found = []
        for region, part in self.parts.items():
            if layer is None:
                found.append((tuple(slice(*bounds) for bounds in region), part))
            elif region[0][0] <= layer < region[0][1]:
                found.append((tuple(slice(*bounds) for bounds in region[1:]), part[layer - region[0][0]]))
        return found

    def array(self) -> jax.Array:
        """The array of all processes."""
        return jax.make_array_from_callback(
            self.shape, self.sharding, lambda index: self.parts[_region(index or (), self.shape)]
        )


def read_sharded(layers: Iterable[tuple[int | None, tuple[str, np.ndarray]]], want: Any, where: Any) -> Any:
    """An array of which each process reads, of every tensor, what its devices hold.

    layers: the tensors by number in the stack, or one without a number. where: its sharding, or for a weight in
    4 bits those of an `NF4Array`: the blocks that this process holds are quantised here.
    Raises SboraxError for a weight in 4 bits that is not finite.
    """
    if isinstance(where, AbstractWeight):
        return _read_nf4(layers, want, where)
    shards = Shards.of(want.shape, want.dtype, where)
    for layer, (_, found) in layers:
        for region, part in shards.slots(layer):
            part[...] = found[region]
    return shards.array()


def _read_nf4(layers: Iterable[tuple[int | None, tuple[str, np.ndarray]]], want: Any, where: Any) -> NF4Array:
    *stack, size, out = want.shape
    codes = Shards.of((*stack, size // 2, out), np.uint8, where.codes)
    # Of a matrix, both are cut into the same whole blocks.
    absmax = Shards.of((*stack, size // BLOCK, out), np.float32, where.absmax)
    for layer, (name, found) in layers:
        scales = {(own[0].start * BLOCK, own[1].start): part for own, part in absmax.slots(layer)}
        for (rows, columns), part in codes.slots(layer):
            blocks = found[2 * rows.start : 2 * rows.stop, columns].astype(want.dtype, copy=False)
            try:
                part[...], scales[2 * rows.start, columns.start][...] = encode_blocks(blocks)
            except SboraxError as error:
                raise SboraxError(f"quant: {name}: {error}") from None
    return jax.device_put(join(codes.array(), absmax.array(), want.dtype), where)
