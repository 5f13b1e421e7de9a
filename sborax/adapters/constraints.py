"""Sharding constraints for code that runs with and without a mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, PyTree, Shaped

from sborax.errors import SboraxError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Mesh axes that the rows of a batch lie on, and so tokens."""


def compiled_axes() -> dict[str, int]:
    """Sizes of those of `AXES` that the mesh at hand has and the compiler cuts along; none without a mesh.

    The mesh may be a user's own: its other axes, and those of a `shard_map` around, are no business of ours.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit in kinds.values():
        return {}
    return {name: mesh.shape[name] for name in AXES if kinds.get(name) == AxisType.Auto}


def check_axis_types() -> None:
    """Raise SboraxError inside a mesh whose axes are Explicit: where a model's values lie is left to the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        names = ", ".join(mesh.axis_names)
        raise SboraxError(
            f"mesh: axes {names} are Explicit, and where the model's values lie is left to the compiler; "
            f"make the mesh with axis_types=(AxisType.Auto,) * {len(mesh.axis_names)}"
        )


def dividing(size: int, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the mesh axes `names` that the compiler may cut an axis of this size along, and cuts evenly."""
    sizes, kept = compiled_axes(), ()
    for name in names:
        if name in sizes and size % math.prod(sizes[own] for own in (*kept, name)) == 0:
            kept = (*kept, name)
    return kept


def cut(x: Shaped[Array, "..."], *entries: Any) -> Shaped[Array, "..."]:
    """`x` cut over the mesh at hand, as far as that has our axes and they divide it.

    entries: for each axis of `x` a name of `AXES`, several, None to keep it whole, or UNCONSTRAINED to leave it open.
        On a mesh with axes that are not ours nothing is kept whole: it may be cut along those.
    """
    ours = compiled_axes()
    if not ours:
        return x
    alone = len(ours) == len(jax.sharding.get_abstract_mesh().axis_names)
    rest = None if alone else jax.P.UNCONSTRAINED

    def entry(size: int, names: Any) -> Any:
        if names is jax.P.UNCONSTRAINED:
            return names
        return dividing(size, (names,) if isinstance(names, str) else names or ()) or rest

    return jax.lax.with_sharding_constraint(x, jax.P(*map(entry, x.shape, entries)))


def sharing() -> int:
    """Devices that share the features of a projection: the size of mesh axis "tensor", 1 without one."""
    return compiled_axes().get("tensor", 1)


def by_rows(x: Float[Array, "tokens _"]) -> Float[Array, "tokens _"]:
    """`x` with its tokens cut over `ROWS` where there is such a mesh; whether features are cut is left open.

    Without it the compiler may cut an activation as a weight beside it lies, and send the activation.
    """
    return cut(x, ROWS, jax.P.UNCONSTRAINED)


def whole(tree: PyTree) -> PyTree:
    """The arrays, uncut on every device of a mesh, so that what is computed from them has the bits of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(tree, PartitionSpec())
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())
