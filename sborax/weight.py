"""What a method may know of a base weight: a plain array, or one in another form that can stand for it."""

import abc
from typing import Any

from jaxtyping import Array, Float


class AbstractWeight(abc.ABC):
    """A base weight that is not a plain array, such as a quantised one. Every method sees it through this."""

    shape: tuple[int, ...]
    dtype: Any

    @abc.abstractmethod
    def dense(self) -> Float[Array, "*stack in out"]:
        """The weight as a plain array of its logical dtype."""

    @abc.abstractmethod
    def rmatmul(self, x: Float[Array, "tokens in"]) -> Float[Array, "tokens out"]:
        """`x @ self` without keeping the dense weight for the backward pass."""

    @abc.abstractmethod
    def encode(self, dense: Float[Array, "*stack in out"]) -> "AbstractWeight":
        """A weight of this kind that holds `dense`, for methods that rewrite the base."""

    @abc.abstractmethod
    def stored(self) -> "AbstractWeight":
        """The weight as it is held where no method rewrites it."""


Weight = Array | AbstractWeight


def is_weight(node: Any) -> bool:
    """Whether `node` is one base weight (for `is_leaf`)."""
    return isinstance(node, AbstractWeight)


def dense(weight: Weight) -> Float[Array, "*stack in out"]:
    """The weight as a plain array."""
    return weight.dense() if isinstance(weight, AbstractWeight) else weight


def matmul(x: Float[Array, "tokens in"], weight: Weight) -> Float[Array, "tokens out"]:
    """`x @ weight` in the dtype of `x`."""
    return weight.rmatmul(x) if isinstance(weight, AbstractWeight) else x @ weight.astype(x.dtype)
