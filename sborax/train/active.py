"""A procedure in a run: it is called between steps, and its segments are kept in the run directory."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jaxtyping import Array, Key, PyTree

from sborax.adapters.tree import Adapters, combine, nodes, split
from sborax.layout.hosts import gathered, on_first
from sborax.layout.sharding import Layout
from sborax.layout.state import Halves, Parts, TrainState
from sborax.procedures import AbstractProcedure, Boundary, Run
from sborax.records.adapter import read_adapter, save_adapter

SEGMENTS = "segments"


@dataclasses.dataclass(frozen=True)
class ActiveProcedure:
    """A procedure that acts on the state and the parts of a run.

    - method: the procedure.
    - run: what it knows of the run.
    - key: of everything it draws.
    - place: the run directory.
    - halves: splits adapters into what is trained and what is not.
    - layout: of the run. `apply` puts what it makes where it lay before, so that the compiled step stays the same.
    """

    method: AbstractProcedure
    run: Run
    key: Key[Array, ""]
    place: epath.Path
    halves: Halves = split
    layout: Layout = Layout()

    def regularise(self, grads: PyTree, train: PyTree) -> PyTree:
        """The gradients of the loss with the procedure's own terms."""
        return self.method.regularise(grads, train)

    def watch(self) -> optax.GradientTransformationExtraArgs:
        """The transformation between clipping and the optimiser."""
        return self.method.watch(self.run)

    @property
    def folded(self) -> list[str]:
        """Paths of the kernels that the procedure changes."""
        return [site.path for site in self.run.plan.sites] if self.method.folds else []

    @property
    def differentiated(self) -> tuple[str, ...]:
        """Paths of the kernels whose gradients the procedure watches."""
        return self.method.differentiates(self.run)

    def due(self, step: int) -> bool:
        """Whether the procedure acts after `step` steps."""
        return self.method.due(step, self.run)

    def resting(self, trained: PyTree) -> set[str]:
        """Paths of the adapters that train nothing until the procedure acts again.

        - trained: the trained halves of all adapters.
        """
        if not self.method.rests:
            return set()
        return {path for path, node in nodes(trained).items() if not any(map(jnp.any, jax.tree.leaves(node.train)))}

    def start(self, parts: Parts) -> Parts:
        """The run before its first step.

        Raises SboraxError if the procedure cannot act on it.
        """
        self.method.check(self.run, parts.base)
        before = Boundary(combine(parts.adapters, parts.frozen), parts.base)
        boundary = self.method.start(self._key(0), self.run, before)
        train, frozen = self.halves(boundary.adapters)
        return dataclasses.replace(parts, adapters=train, frozen=frozen, base=boundary.base)

    def apply(
        self, step: int, state: TrainState, parts: Parts, tx: optax.GradientTransformation
    ) -> tuple[TrainState, Parts]:
        """The run after the procedure has acted on it, between step `step` and the next."""
        before = Boundary(combine(state.train["adapters"], parts.frozen), parts.base, state.opt)
        if self.method.resets:
            segment = gathered(before.adapters)
            on_first(lambda: save_adapter(self._segment(step), segment))
        boundary = self.method.apply(self._key(step), step, self.run, before)
        adapters, frozen = self.halves(boundary.adapters)
        train = {**state.train, "adapters": adapters}
        opt = restarted(tx, boundary.opt, train) if self.method.resets else boundary.opt
        after = TrainState(state.step, train, opt), dataclasses.replace(parts, frozen=frozen, base=boundary.base)
        return self.layout.beside(after, (state, parts))

    def replay(self, done: int, state: TrainState, parts: Parts) -> Parts:
        """The constant parts of a run as they were after `done` steps, from those before its first step.

        Raises SboraxError for a missing or damaged segment.
        """
        first = Boundary(combine(parts.adapters, parts.frozen), parts.base, state.opt)

        def segment(step: int) -> Adapters:
            return self.layout.beside(self._kept(step), first.adapters)

        boundary = self.method.replay(self._key, done, self.run, first, segment)
        after = dataclasses.replace(parts, frozen=self.halves(boundary.adapters)[1], base=boundary.base)
        return self.layout.beside(after, parts)

    def adapters(self, state: TrainState, parts: Parts) -> Adapters:
        """Everything trained so far, as adapters of the base that the run began with."""
        steps = [step for step in range(1, int(state.step) + 1) if self.method.resets and self.due(step)]
        last = Boundary(combine(state.train["adapters"], parts.frozen), parts.base, state.opt)
        segments = [*(self._kept(step) for step in steps), gathered(self.method.settle(last).adapters)]
        return self.method.joined(segments, self.run)

    def _key(self, step: int) -> Key[Array, ""]:
        return jax.random.fold_in(self.key, step)

    def _segment(self, step: int) -> epath.Path:
        return self.place / SEGMENTS / f"{step:08d}"

    def _kept(self, step: int) -> Adapters:
        return read_adapter(self._segment(step)).adapters


def restarted(tx: optax.GradientTransformation, opt: PyTree, train: PyTree) -> PyTree:
    """A new state of the optimiser that is as far along its schedule of learning rates as `opt`."""

    def has_clock(node: PyTree) -> bool:
        return isinstance(node, optax.ScaleByScheduleState | optax.schedules.InjectStatefulHyperparamsState)

    def joined(old: PyTree, new: PyTree) -> PyTree:
        if isinstance(old, optax.schedules.InjectStatefulHyperparamsState):
            return old._replace(inner_state=resumed(old.inner_state, new.inner_state))
        return old if isinstance(old, optax.ScaleByScheduleState) else new

    def resumed(old: PyTree, new: PyTree) -> PyTree:
        return jax.tree.map(joined, old, new, is_leaf=has_clock)

    return resumed(opt, jax.jit(tx.init)(train))
