"""Meshes over devices, and batches that fit on them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from sborax.adapters.constraints import AXES, EXPERT, ROWS
from sborax.errors import SboraxError

SLICES = "slices"
"""Not a mesh axis: groups of devices on a slow network. Batches are split across them first."""


def check_mesh(sizes: Mapping[str, int]) -> None:
    """Raise SboraxError for an unknown axis or a size below 1."""
    for name, size in sizes.items():
        if name not in (*AXES, SLICES):
            raise SboraxError(f"mesh: no axis {name!r}; there are {', '.join((*AXES, SLICES))}")
        if size < 1:
            raise SboraxError(f"mesh: {name} must be at least 1, got {size}")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these sizes over the first of `devices`, by default JAX's. Absent axes have size 1.

    "slices" multiplies "data": each of that many slices, or hosts, has a mesh of the other sizes. Only sums over the
    data axis go from one slice to another.

    Raises SboraxError as `check_mesh` does, for more devices than there are, for fewer than all processes have, and for
    devices of several slices without "slices".
    """
    check_mesh(sizes)
    slices, shape = sizes.get(SLICES, 1), [sizes.get(name, 1) for name in AXES]
    needed, devices = slices * math.prod(shape), jax.devices() if devices is None else devices
    text = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if needed > len(devices):
        raise SboraxError(f"mesh: {text} needs {needed} devices, there are {len(devices)} ({devices[0].device_kind})")
    if jax.process_count() > 1 and needed < len(devices):
        raise SboraxError(f"mesh: {text} takes {needed} of {len(devices)} devices; several processes must use all")
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        groups = len({getattr(device, "slice_index", None) for device in devices[:needed]})
        if groups > 1:
            raise SboraxError(
                f"mesh: {text} takes devices of {groups} slices; write slices={groups}, and sizes in each"
            )
        # `jax.make_mesh` does not cut a dimension of a torus in two, as fsdp 64 x tensor 4 needs on a v6e of 16 x 16.
        laid = mesh_utils.create_device_mesh(shape, devices[:needed], allow_split_physical_axes=True)
        return Mesh(laid, AXES, axis_types=types)
    # If devices have no `slice_index`, the slow network is the one between processes.
    named = all(isinstance(getattr(device, "slice_index", None), int) for device in devices)
    try:
        laid = mesh_utils.create_hybrid_device_mesh(
            shape,
            [slices] + [1] * (len(AXES) - 1),
            devices[:needed],
            process_is_granule=not named,
            allow_split_physical_axes=True,
        )
    except ValueError as error:
        raise SboraxError(f"mesh: {text} does not fit the slices or hosts that there are ({error})") from error
    return Mesh(laid, AXES, axis_types=types)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """The mesh of these sizes without any devices.

    Raises SboraxError as `check_mesh` does.
    """
    check_mesh(sizes)
    shape = (sizes.get("data", 1) * sizes.get(SLICES, 1), *(sizes.get(name, 1) for name in AXES[1:]))
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_rows(batch_size: int, sizes: Mapping[str, int]) -> None:
    """Raise SboraxError for a batch whose rows cannot be divided evenly over a mesh of these sizes."""
    shards = math.prod(sizes[name] for name in ROWS)
    if batch_size % shards:
        names = " x ".join(name for name in ROWS if name != EXPERT or sizes[name] > 1)
        near = [str(size) for size in (batch_size // shards * shards, -(-batch_size // shards) * shards) if size]
        raise SboraxError(
            f"batch_size: {batch_size} rows are not divisible by {names} = {shards} of the mesh; try "
            f"{' or '.join(near)}"
        )
