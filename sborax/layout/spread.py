"""Shardings of adapter leaves: each is cut along every mesh axis that its kernel is cut along, where that divides."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sborax.adapters.constraints import mesh_axes

SMALL = 2**16
"""A frozen leaf with fewer entries, in all layers, is only cut as its kernel is: each layer would gather it."""


def spread(
    mesh: Mesh | AbstractMesh, shape: Sequence[int], spec: PartitionSpec, stack: int, names: Sequence[str]
) -> NamedSharding:
    """The sharding of a leaf that is cut along all mesh axes of `names`.

    A mesh axis stays where `spec` has it, if it divides the leaf there. Else it cuts the axis with the longest parts
    among those that it divides. If it divides none, its prime factors are placed in this way, one by one, on a mesh of
    the same devices that has an axis for each. A factor that divides nothing is left out. Stack axes are not cut, since
    layers are used in turn.

    - spec: the leaf's entries, those of its stack axes first.
    - stack: the number of stack axes.
    """
    axis_of = {name: axis for axis, entry in enumerate(spec) for name in mesh_axes(entry)}
    active = sorted(
        (name for name in names if mesh.shape[name] > 1), key=lambda name: (name not in axis_of, -mesh.shape[name])
    )
    parts, cuts, split = list(shape), [list[str]() for _ in shape], dict[str, dict[str, int]]()

    def place(name: str, size: int, home: int | None) -> bool:
        """Cut the leaf along an axis of the mesh. Returns whether that divides an axis of the leaf."""
        order = sorted(range(stack, len(shape)), key=lambda axis: (axis != home, -parts[axis]))
        axis = next((axis for axis in order if parts[axis] % size == 0), None)
        if axis is not None:
            parts[axis] //= size
            cuts[axis].append(name)
        return axis is not None

    for name in active:
        if not place(name, mesh.shape[name], axis_of.get(name)):
            split[name] = {f"{name}/{i}": prime for i, prime in enumerate(_primes(mesh.shape[name]))}
            for factor, prime in split[name].items():
                place(factor, prime, axis_of.get(name))
    entries = [*spec[:stack], *(None,) * (stack - len(spec)), *map(_entry, cuts[stack:])]
    return NamedSharding(_finer(mesh, split), PartitionSpec(*entries))


def _entry(names: Sequence[str]) -> Any:
    return names[0] if len(names) == 1 else tuple(names) or None


def _primes(size: int) -> list[int]:
    """The prime factors of `size`, the smallest first."""
    for prime in range(2, math.isqrt(size) + 1):
        if size % prime == 0:
            return [prime, *_primes(size // prime)]
    return [size]


def _finer(mesh: Mesh | AbstractMesh, split: Mapping[str, Mapping[str, int]]) -> Mesh | AbstractMesh:
    """The mesh of the same devices in the same order, with several axes in place of each axis in `split`."""
    if not split:
        return mesh
    sizes = {part: size for name in mesh.axis_names for part, size in split.get(name, {name: mesh.shape[name]}).items()}
    types = (AxisType.Auto,) * len(sizes)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    return Mesh(np.reshape(mesh.devices, tuple(sizes.values())), tuple(sizes), axis_types=types)
