"""Methods that start from statistics of the inputs of their weights on some data."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sborax.adapters.core import AbstractComposite, AbstractMethod, Hint, Leaves, Rank

Place = tuple[str, int]
"""A weight: the path of its kernel, and its position in the flattened stack."""


class Inputs(NamedTuple):
    """The inputs of some weights on one batch.

    - rows: by path of the kernel, one entry for each weight of its flattened stack.
    - real: which tokens are no padding.
    - answers: which tokens belong to an answer.
    """

    rows: Mapping[str, Float[Array, "weights batch seq in"]]
    real: Bool[np.ndarray, "batch seq"]
    answers: Bool[np.ndarray, "batch seq"]


class Gathered(NamedTuple):
    """What a method made of the inputs of one weight.

    - inputs: for `Hint.inputs`. Arrays of one name have one shape for all weights of a stack.
    - rank: the rank that the weight is to have, if the method chooses it; 0 for no adapter.
    """

    inputs: Leaves
    rank: int | None = None


class AbstractInformed(AbstractMethod):
    """A method that starts from statistics of its weights' inputs. It declares `needs` with "inputs"."""

    joint: bool = False
    """`gather` compares weights of different kernels, so one call has them all. Otherwise each kernel has a call."""

    @abc.abstractmethod
    def blank(self, shape: tuple[int, int]) -> Leaves:
        """Zeros in the form of `Gathered.inputs` for an (in, out) weight. Planning computes with their shapes."""

    @classmethod
    @abc.abstractmethod
    def gather(
        cls, methods: Mapping[Place, "AbstractInformed"], batches: Sequence[Callable[[], Inputs]]
    ) -> dict[Place, Gathered]:
        """The statistics of every weight.

        - methods: the method of each weight, all of this class, in the order of the model.
        - batches: functions that compute one batch each. They may be called again, which costs a forward pass.
        """

    @abc.abstractmethod
    def with_ranks(self, ranks: Rank) -> "AbstractInformed":
        """The method with the ranks that `gather` chose, of one weight or of a stack. They are final."""


def informed(method: AbstractMethod) -> list[AbstractInformed]:
    """The methods that start from inputs among `method` and its parts. The ranks of parts are final."""
    if isinstance(method, AbstractInformed):
        return [method]
    members = method.members if isinstance(method, AbstractComposite) else links(method)
    return [part.with_ranks(part.rank) for member in members for part in informed(member)]


def links(method: AbstractMethod) -> tuple[AbstractMethod, ...]:
    """The methods among the fields of one that is no composite, such as the links of a chain."""
    return tuple(value for value in vars(method).values() if isinstance(value, AbstractMethod))


def blank_hint(method: AbstractMethod, shape: tuple[int, int]) -> Hint:
    """A hint with all that `method` needs for an (in, out) weight, zero."""
    inputs: dict[str, Any] = {}
    for part in informed(method):
        inputs |= part.blank(shape)
    return Hint(grad=jnp.zeros(shape), inputs=inputs)
