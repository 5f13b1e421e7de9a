"""Sharding constraints for code that runs with and without a mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, PyTree, Shaped

from sborax.errors import SboraxError

AXES = ("data", "fsdp", "expert", "tensor")
ROWS = ("data", "fsdp", "expert")
"""Mesh axes that the rows of a batch, and so tokens, are cut over."""
EXPERT = "expert"
"""The mesh axis that the experts of a mixture are cut over. Dense layers use it like fsdp."""
SHARED = "tensor"
"""The mesh axis of devices that share the features of a projection."""


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def compiled_axes() -> dict[str, int]:
    """Sizes of the axes in `AXES` that the current mesh has and that the compiler cuts along; none without a mesh.

    The mesh may be a user's: its other axes, and those of a surrounding `shard_map`, are left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit in kinds.values():
        return {}
    return {name: mesh.shape[name] for name in AXES if kinds.get(name) == AxisType.Auto}


def check_axis_types() -> None:
    """Raise SboraxError inside a mesh with Explicit axes, since the compiler decides where a model's values lie."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        names = ", ".join(mesh.axis_names)
        raise SboraxError(
            f"mesh: axes {names} are Explicit, and where the model's values lie is left to the compiler; "
            f"make the mesh with axis_types=(AxisType.Auto,) * {len(mesh.axis_names)}"
        )


def dividing(size: int, names: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes among `names` over which the compiler can cut an array axis of `size` evenly."""
    sizes, axes = compiled_axes(), ()
    for name in names:
        if name in sizes and size % math.prod(sizes[axis] for axis in (*axes, name)) == 0:
            axes = (*axes, name)
    return axes


def cut(x: Shaped[Array, "..."], *entries: Any) -> Shaped[Array, "..."]:
    """`x` cut over the current mesh, as far as the mesh has our axes and they divide `x`.

    - entries: for each axis of `x` a name of `AXES`, several names, None to keep it whole, or UNCONSTRAINED to leave it
      to the compiler. If the mesh has other axes than ours, None leaves it to the compiler, too.
    """
    axes = compiled_axes()
    if not axes:
        return x
    only_ours = len(axes) == len(jax.sharding.get_abstract_mesh().axis_names)
    default = None if only_ours else jax.P.UNCONSTRAINED

    def entry(size: int, names: Any) -> Any:
        if names is jax.P.UNCONSTRAINED:
            return names
        return dividing(size, (names,) if isinstance(names, str) else names or ()) or default

    return jax.lax.with_sharding_constraint(x, jax.P(*map(entry, x.shape, entries)))


def sharing() -> int:
    """How many devices share the features of a projection: the size of mesh axis `SHARED`, 1 without one."""
    return compiled_axes().get(SHARED, 1)


def by_rows(x: Float[Array, "tokens _"]) -> Float[Array, "tokens _"]:
    """`x` with its tokens cut over `ROWS`, if there is a mesh. Whether features are cut is left to the compiler.

    Without this the compiler may cut an activation like a weight next to it, and send the activation.
    """
    return cut(x, ROWS, jax.P.UNCONSTRAINED)


def replicate(tree: PyTree) -> PyTree:
    """The arrays, entire on every device of the mesh, so that results have the bits of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(tree, PartitionSpec())
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())
