"""What code that knows nothing of layouts may say of a mesh: which devices share features, which hold which tokens."""

import jax
from jaxtyping import Array, Float, PyTree

ROWS = ("data", "fsdp")
"""Mesh axes that the rows of a batch lie on, and so tokens."""


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
