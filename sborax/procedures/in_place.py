"""Procedures that change adapters, or the state of the optimiser, as they are: budgets and pruning."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array, Key, PyTree

from sborax.adapters.compose import ByLayer
from sborax.adapters.core import Adapter, SboraxError
from sborax.adapters.tree import Adapters, nodes
from sborax.procedures.procedure import AbstractProcedure, Boundary, Run

S = TypeVar("S")


class AbstractInPlace(AbstractProcedure):
    """A procedure that changes trained leaves, or the state that its `watch` keeps in the optimiser's.

    Checkpoints hold both, so that only frozen leaves have to be made again: `settle` makes them, where there are any.
    """

    resets = False

    def replay(
        self,
        key_of: Callable[[int], Key[Array, ""]],
        done: int,
        run: Run,
        boundary: Boundary,
        adapters_after: Callable[[int], Adapters],
    ) -> Boundary:
        return self.settle(boundary)

    def joined(self, segments: list[Adapters], run: Run) -> Adapters:
        return segments[-1]


def check_layers(procedure: AbstractProcedure, run: Run) -> None:
    """Raise SboraxError unless every stack is adapted as a whole, by one method."""
    for site in run.plan.sites:
        if isinstance(site.method, ByLayer):
            raise SboraxError(
                f"{type(procedure).__name__}: {site.path}: rules with layers= leave some of its layers out, or adapt "
                "them by several methods; give all layers one method"
            )


def find_state(opt: PyTree, kind: type[S]) -> S | None:
    """What `watch` keeps in the state of an optimiser, by its class; None without it."""
    leaves = jax.tree.leaves(opt, is_leaf=lambda node: isinstance(node, kind))
    return next((leaf for leaf in leaves if isinstance(leaf, kind)), None)


def replace_state(opt: PyTree, state: PyTree) -> PyTree:
    """The state of an optimiser with `state` in the place of the one of its class."""

    def is_state(node: PyTree) -> bool:
        return isinstance(node, type(state))

    return jax.tree.map(lambda node: state if is_state(node) else node, opt, is_leaf=is_state)


def adapters_by_path(tree: PyTree) -> dict[str, Adapter]:
    """Adapters by the path of their kernel; `tree` holds them alone, or is what a run trains."""
    return {path.removeprefix("adapters/"): node for path, node in nodes(tree).items()}
