"""The interface of an optimiser, and the optax transformation that a run makes of it."""

import abc
from typing import Any, Protocol, runtime_checkable

import optax
from jaxtyping import PyTree

from sborax.adapters.tree import split
from sborax.config.codec import LiveObject
from sborax.layout.state import Halves


class AbstractOptimizer(abc.ABC):
    """An optimiser: a frozen dataclass of its hyper-parameters. Extend it for one of your own.

    `AbstractScheduled` (`sborax/train/optimizers.py`) adds warm-up, schedule and clipping, and asks for `build` alone.
    """

    @abc.abstractmethod
    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate by step, for a run of `steps` steps."""

    @abc.abstractmethod
    def build(self, lr: optax.Schedule) -> optax.GradientTransformation:
        """The optax transformation with learning rates `lr`."""

    def before(self) -> tuple[optax.GradientTransformation, ...]:
        """Transformations of the gradients before `build`'s, such as clipping. A procedure watches their result."""
        return ()

    def after(self) -> tuple[optax.GradientTransformation, ...]:
        """Transformations of the updates after `build`'s."""
        return ()

    def halves(self) -> Halves:
        """The function that splits adapters into what is trained and what is held fixed."""
        return split

    def without_rate(self) -> "AbstractOptimizer":
        """This optimiser with neutral values for the fields that only `rate` reads.

        Members of a sweep share a program if these are equal.
        """
        return self

    def label(self) -> str:
        """A few words for people, such as `adamw at 0.0002 (linear)`."""
        return type(self).__name__


AnyOptimizer = AbstractOptimizer | LiveObject | optax.GradientTransformation
"""The optimisers that an experiment takes. An optax transformation becomes a `LiveObject`."""


def halves(optimizer: AnyOptimizer) -> Halves:
    """The function that splits adapters into what this optimiser trains and what it holds fixed."""
    return optimizer.halves() if isinstance(optimizer, AbstractOptimizer) else split


def schedule(optimizer: AnyOptimizer, steps: int) -> optax.Schedule | None:
    """The learning rate by step; None for an optax transformation, which does not expose it."""
    return optimizer.rate(steps) if isinstance(optimizer, AbstractOptimizer) else None


@runtime_checkable
class Hooks(Protocol):
    """The functions of a run's procedure, an `ActiveProcedure`, that an optimiser calls."""

    def regularise(self, grads: PyTree, train: PyTree) -> PyTree: ...

    def watch(self) -> optax.GradientTransformationExtraArgs: ...


def make_optimizer(
    optimizer: AnyOptimizer,
    steps: int,
    procedure: Hooks | None = None,
    lr: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """The chain of `before`, the procedure's `watch`, `build` and `after`, on the gradients of its `regularise`.

    Args:
    - steps: of the whole run.
    - procedure: of the run; None without one.
    - lr: learning rates; None (default) for the optimiser's own.

    Raises SboraxError for an optax transformation that was given to another program.
    """
    watched = () if procedure is None else (procedure.watch(),)
    if isinstance(optimizer, AbstractOptimizer):
        rule = optimizer.build(optimizer.rate(steps) if lr is None else lr)
        chain = optax.chain(*optimizer.before(), *watched, rule, *optimizer.after())
    else:
        chain = optax.chain(
            *watched, optimizer.require("optimizer") if isinstance(optimizer, LiveObject) else optimizer
        )
    return chain if procedure is None else _regularised(chain, procedure)


def _regularised(tx: optax.GradientTransformation, procedure: Hooks) -> optax.GradientTransformationExtraArgs:
    """`tx` on the gradients of `procedure.regularise`, with the state of `tx`."""
    tx = optax.with_extra_args_support(tx)

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        return tx.update(procedure.regularise(updates, params), state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)
