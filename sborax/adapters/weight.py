"""Base weights as methods see them: plain arrays, or other forms, such as quantised ones, behind one interface."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PyTree

from sborax.adapters.constraints import replicate
from sborax.errors import SboraxError


class AbstractWeight(abc.ABC):
    """A base weight that is not a plain array, such as a quantised one. Methods use this interface alone."""

    shape: tuple[int, ...]
    dtype: Any

    @abc.abstractmethod
    def dense(self) -> Float[Array, "*stack in out"]:
        """The weight as a plain array of its logical dtype."""

    @abc.abstractmethod
    def rmatmul(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        """`x @ self`. The dense weight is not kept for the backward pass."""

    @abc.abstractmethod
    def encode(self, dense: Float[Array, "*stack in out"]) -> "AbstractWeight":
        """A weight of this kind with the values `dense`, for methods that rewrite the base."""

    @abc.abstractmethod
    def stored(self) -> "AbstractWeight":
        """The weight as it is stored if no method rewrites it."""

    @abc.abstractmethod
    def cut_along(self, *axes: str | None) -> "AbstractWeight":
        """The weight, to be gathered on a mesh before it is made dense, except along `axes`: so less is sent.

        - axes: of the mesh, for the input and the output; None for an axis that is whole.
        """


Weight = Array | AbstractWeight


def is_weight(node: Any) -> bool:
    """Whether `node` is a base weight that is no plain array; for `is_leaf`."""
    return isinstance(node, AbstractWeight)


def dense(weight: Weight) -> Float[Array, "*stack in out"]:
    """The weight as a plain array."""
    return weight.dense() if isinstance(weight, AbstractWeight) else weight


def matmul(x: Float[Array, "tokens in"], weight: Weight) -> Float[Array, "tokens out"]:
    """`x @ weight` in the dtype of `x`."""
    return weight.rmatmul(x) if isinstance(weight, AbstractWeight) else x @ weight.astype(x.dtype)


def check_finite(name: str, tree: PyTree) -> None:
    """Raise SboraxError, which begins with `name`, if a float leaf of `tree` has a NaN or an infinity.

    Traced leaves pass, since they have no values yet. Leaves on devices are reduced there, by all hosts with a share.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    concrete = [leaf for leaf in leaves if not isinstance(leaf, Tracer)]
    # Inside a trace, too, arrays that it closes over have values.
    with jax.ensure_compile_time_eval():
        finite = [np.isfinite(leaf).all() if isinstance(leaf, np.ndarray) else _finite(leaf) for leaf in concrete]
        if not all(finite):
            raise SboraxError(f"{name}: holds values that are not finite (NaN or infinite)")


@jax.jit
def _finite(leaf: Float[Array, "..."]) -> Bool[Array, ""]:
    return replicate(jnp.isfinite(leaf).all())
