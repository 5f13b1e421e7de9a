"""What happens between two steps of a run: merges, fresh starts, pruning. Pure functions at steps known on the host."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Key, PyTree

from sborax.adapters.compose import ByLayer
from sborax.adapters.core import SboraxError
from sborax.adapters.paths import Plan
from sborax.adapters.tree import Adapters


@dataclasses.dataclass(frozen=True)
class Run:
    """What a procedure may know of a run: its plan, its number of steps, the model's key-value heads."""

    plan: Plan
    steps: int
    kv_heads: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boundary:
    """A run between two steps: whole adapters, base weights by path, state of the optimiser."""

    adapters: Adapters
    base: dict[str, Any]
    opt: PyTree = None


class AbstractProcedure(abc.ABC):
    """Changes a run between steps. Concrete procedures are frozen dataclasses of hyper-parameters."""

    paper: str
    """Title and arXiv id."""
    resets: bool
    """`apply` makes the adapters anew: the optimiser starts again, and what was trained so far is kept beside."""
    folds: bool = False
    """`apply` changes the adapted kernels of the base, which no two runs can then share."""
    observes: bool = False
    """`watch` is given `norms=`, those of every projection's input features over the step's tokens, by path."""

    @abc.abstractmethod
    def check(self, run: Run, base: dict[str, Any]) -> None:
        """Raise `SboraxError` if this procedure cannot act on such a run."""

    @abc.abstractmethod
    def watch(self, run: Run) -> optax.GradientTransformationExtraArgs:
        """What sees every step's gradient, after clipping and before the optimiser.

        Its `update` is given `params`, and as keywords `frozen` and `base`.
        """

    @abc.abstractmethod
    def start(self, key: Key[Array, ""], run: Run, boundary: Boundary) -> Boundary:
        """The run before its first step, from freshly attached adapters."""

    @abc.abstractmethod
    def due(self, step: int, run: Run) -> bool:
        """Whether `apply` is called after `step` steps."""

    @abc.abstractmethod
    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        """The run after what is due after `step` steps."""

    @abc.abstractmethod
    def replay(
        self,
        key_of: Callable[[int], Key[Array, ""]],
        done: int,
        run: Run,
        boundary: Boundary,
        kept: Callable[[int], Adapters],
    ) -> Boundary:
        """The frozen adapters and the base as they were after `done` steps, bit for bit.

        boundary: that of `start`, with the restored state of the optimiser.
        key_of: the key that `apply` had after a step. kept: the adapters that it was given.
        """

    @abc.abstractmethod
    def settle(self, boundary: Boundary) -> Boundary:
        """The same with the frozen leaves that follow from the state of the optimiser.

        Adapters are written after it, so that a file never depends on when `apply` was last called.
        """

    @abc.abstractmethod
    def whole(self, segments: list[Adapters], run: Run) -> Adapters:
        """One tree of adapters for the base that the run began with.

        segments: the adapters of every `apply`, in order, and those of the end.
        """


def check_layers(procedure: AbstractProcedure, run: Run) -> None:
    """Raise SboraxError unless every stack is adapted as a whole, by one method."""
    for site in run.plan.sites:
        if isinstance(site.method, ByLayer):
            raise SboraxError(
                f"{type(procedure).__name__}: {site.path}: rules with layers= leave some of its layers out, or adapt "
                "them by several methods; give all layers one method"
            )
