"""The interface of procedures, which act between two steps of a run: pure functions at steps known on the host."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Key, PyTree

from sborax.adapters.paths import Plan
from sborax.adapters.tree import Adapters


@dataclasses.dataclass(frozen=True)
class Run:
    """The properties of a run that a procedure reads: its plan, its number of steps, the model's key-value heads."""

    plan: Plan
    steps: int
    kv_heads: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boundary:
    """A run between two steps: adapters (both halves), base weights by path, state of the optimiser."""

    adapters: Adapters
    base: dict[str, Any]
    opt: PyTree = None


class AbstractProcedure(abc.ABC):
    """Changes a run between steps. Concrete procedures are frozen dataclasses of hyper-parameters.

    Extend `AbstractSegmented` if adapters are merged and made anew, `AbstractInPlace` if they are changed as they are:
    then `check`, `due` and `apply` are all that is left to write.
    """

    paper: str
    """Title and arXiv id."""
    resets: bool
    """`apply` makes the adapters anew: the optimiser restarts, and the adapters so far are kept as a segment."""
    folds: bool = False
    """`apply` changes the adapted kernels of the base, so that members of a sweep cannot share them."""
    rests: bool = False
    """Adapters that are zero stay zero until the next `apply`, so one without a gradient is no sign of an error."""
    observes: bool = False
    """`watch` is given `norms=`, those of every projection's input features over the step's tokens, by path."""

    def differentiates(self, run: Run) -> tuple[str, ...]:
        """Paths of base kernels whose gradients `watch` is given, as `base_grads=` by path. By default none.

        Every step then holds them all, as large as the kernels and in their precision.
        """
        return ()

    @abc.abstractmethod
    def check(self, run: Run, base: dict[str, Any]) -> None:
        """Raise `SboraxError` if this procedure cannot act on such a run."""

    def regularise(self, grads: PyTree, train: PyTree) -> PyTree:
        """The gradients with those of the procedure's own terms of the loss, before clipping. By default unchanged.

        Args:
        - grads: of the run's loss.
        - train: the trained leaves.
        """
        return grads

    def watch(self, run: Run) -> optax.GradientTransformationExtraArgs:
        """The transformation that gets every step's gradients after clipping and before the optimiser.

        Its `update` is given `params`, and as keywords `frozen`, `base` and `base_grads`. By default it passes
        gradients on.
        """
        return optax.with_extra_args_support(optax.identity())

    def start(self, key: Key[Array, ""], run: Run, boundary: Boundary) -> Boundary:
        """The run before its first step, from freshly attached adapters. By default unchanged."""
        return boundary

    @abc.abstractmethod
    def due(self, step: int, run: Run) -> bool:
        """Whether `apply` is called after `step` steps."""

    @abc.abstractmethod
    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        """The run after the procedure has acted on it, between step `step` and the next."""

    @abc.abstractmethod
    def replay(
        self,
        key_of: Callable[[int], Key[Array, ""]],
        done: int,
        run: Run,
        boundary: Boundary,
        adapters_after: Callable[[int], Adapters],
    ) -> Boundary:
        """The frozen adapters and the base as they were after `done` steps, bit for bit.

        Args:
        - key_of: the key that `apply` had after a step.
        - boundary: that of `start`, with the restored state of the optimiser.
        - adapters_after: the adapters that `apply` was given after a step, if the procedure `resets`.
        """

    def settle(self, boundary: Boundary) -> Boundary:
        """The run with the frozen leaves that follow from the state of the optimiser. By default unchanged.

        Adapters are written after it, so that a file never depends on when `apply` was last called.
        """
        return boundary

    @abc.abstractmethod
    def joined(self, segments: list[Adapters], run: Run) -> Adapters:
        """One tree of adapters for the base that the run began with.

        Args:
        - segments: the adapters that every `apply` was given, in order, and those of the end. Those of the end alone
            unless the procedure `resets`.
        """
