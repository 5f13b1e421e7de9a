"""What code that knows nothing of layouts may say of a mesh: which devices share features, which hold which tokens."""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, PyTree

from sborax.errors import SboraxError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""Mesh axes that the rows of a batch lie on, and so tokens."""
SLICES = "slices"
"""Of a layout, not an axis: groups of devices with a slow network between them, over which data is dealt first."""


def check_mesh(sizes: Mapping[str, int]) -> None:
    """Raise SboraxError for an axis that there is not, or of no devices."""
    for name, size in sizes.items():
        if name not in (*AXES, SLICES):
            raise SboraxError(f"mesh: no axis {name!r}; there are {', '.join((*AXES, SLICES))}")
        if size < 1:
            raise SboraxError(f"mesh: {name} must be at least 1, got {size}")


def sharing() -> int:
    """Devices that share the features of a projection: the size of mesh axis "tensor", 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def by_rows(x: Float[Array, "tokens _"]) -> Float[Array, "tokens _"]:
    """`x` with its tokens cut over `ROWS` where there is such a mesh; whether features are cut is left open.

    Without it the compiler may cut an activation as a weight beside it lies, and send the activation.
    """
    if not set(ROWS) <= set(jax.sharding.get_abstract_mesh().axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(ROWS, jax.P.UNCONSTRAINED))


def whole(tree: PyTree) -> PyTree:
    """The arrays, uncut on every device of a mesh, so that what is computed from them has the bits of one device."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.sharding.PartitionSpec())
