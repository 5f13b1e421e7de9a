"""The members of a sweep as one program: their own leaves are stacked, shared ones are passed once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from sborax.adapters.core import SboraxError
from sborax.layout.state import Flat, Parts, TrainState
from sborax.models.language_model import LanguageModel
from sborax.sweep.grid import Member
from sborax.train.active import ActiveProcedure
from sborax.train.loss import AbstractLoss, CrossEntropy
from sborax.train.optimizer import AbstractOptimizer, make_optimizer
from sborax.train.step import WATCHED, make_evaluation, make_step
from sborax.train.streams import Streams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SweepState:
    """What a step changes. Every leaf has a leading axis of members.

    - run: the `TrainState` of a single run, with `opt` as the list of its leaves.
    - diverged: int32, the step whose loss or gradient was not finite; 0 for a member that goes on. A member that
      diverged keeps its state from before that step.
    """

    run: Any
    diverged: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MemberConstants:
    """Inputs of the step that differ between members and stay constant. Every leaf has a leading axis of members.

    - frozen: the frozen leaves of the adapters that differ between members, or may come to differ.
    - key: of dropout.
    - lr: learning rates by step.
    - optimizer: index into `StackedMembers.optimizers`.
    - base: kernels of the base, by path, that a procedure changes member by member.
    """

    frozen: Any
    key: Any
    lr: Any
    optimizer: Any
    base: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class StackedMembers:
    """All members of a sweep, stacked.

    - constants: what differs between members.
    - shared: frozen leaves that are the same in all members.
    - join: `join(shared, frozen)` is the frozen half of one member's adapters.
    - optimizers: the distinct optimisers, without their learning rates.
    - count: how many members.
    - at_once: how many of them a step computes together.
    - txs: an optax transformation for each of `optimizers`, without learning rates.
    - procedure: of one member; None without one.
    - loss: of all members.
    - running: numbers of the members that a step computes; None for all. The others keep their state.
    """

    constants: MemberConstants
    shared: list[Array]
    join: Callable[[list[Array], list[Array]], PyTree]
    optimizers: tuple[AbstractOptimizer, ...]
    count: int
    at_once: int
    txs: tuple[optax.GradientTransformation, ...] = ()
    procedure: ActiveProcedure | None = None
    loss: AbstractLoss = CrossEntropy()
    running: tuple[int, ...] | None = None

    def tx(self, number: int) -> optax.GradientTransformation:
        """The optimiser of a member, without its learning rates."""
        return self.txs[int(self.constants.optimizer[number])]

    def over(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Map `function` of one member over all that go on, `at_once` at a time."""
        count = self.count if self.running is None else len(self.running)
        if self.at_once >= count:
            return jax.vmap(function)
        if self.at_once == 1:
            return lambda members: jax.lax.map(function, members)
        return lambda members: jax.lax.map(function, members, batch_size=self.at_once)

    def some(self, members: PyTree) -> PyTree:
        """The members that go on, out of leaves with a leading axis of all members."""
        if self.running is None:
            return members
        return jax.tree.map(lambda leaf: leaf[jnp.asarray(self.running, jnp.int32)], members)

    def replaced(self, members: PyTree, some: PyTree) -> PyTree:
        """The inverse of `some`: all members, with those that go on replaced."""
        if self.running is None:
            return some
        return jax.tree.map(lambda leaf, part: leaf.at[jnp.asarray(self.running, jnp.int32)].set(part), members, some)


def rates(optimizer: AbstractOptimizer, steps: int) -> Float[Array, " steps"]:
    """The learning rate of every step of a run."""
    values = optimizer.rate(steps)(jnp.arange(steps, dtype=jnp.int32))
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32), (steps,))


def optimizer_of(member: Member) -> AbstractOptimizer:
    """The optimiser of a member; `Sweep.members` has checked its type."""
    optimizer = member.experiment.optimizer
    assert isinstance(optimizer, AbstractOptimizer)
    return optimizer


def make_member_optimizer(
    optimizers: Sequence[AbstractOptimizer],
    lr: Float[Array, " steps"],
    index: Int[Array, ""],
    procedure: ActiveProcedure | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of one member: `optimizers[index]` at its own learning rates. Its state is a list of leaves.

    Each optimiser is a branch of the program with its numbers as constants, so rounding is that of a single run.
    """
    txs = [
        optax.with_extra_args_support(make_optimizer(optimizer, 1, procedure, lambda count: lr[count]))
        for optimizer in optimizers
    ]

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, list[Array]]:
        def branch(tx: optax.GradientTransformationExtraArgs) -> Callable[[], tuple[PyTree, list[Array]]]:
            structure = jax.tree.structure(jax.eval_shape(tx.init, params))

            def apply() -> tuple[PyTree, list[Array]]:
                new, after = tx.update(updates, jax.tree.unflatten(structure, state), params, **extra)
                return new, jax.tree.leaves(after)

            return apply

        branches = [branch(tx) for tx in txs]
        return branches[0]() if len(branches) == 1 else jax.lax.switch(index, branches)

    return optax.GradientTransformationExtraArgs(lambda params: jax.tree.leaves(txs[0].init(params)), update)


def gather(
    members: Sequence[Member],
    parts: Sequence[Parts],
    steps: int,
    at_once: int,
    procedure: ActiveProcedure | None = None,
) -> tuple[StackedMembers, SweepState]:
    """Stack the members, and make their state before the first step.

    - parts: of every member.
    - procedure: of one member. With a procedure no frozen leaf is shared, since it may change any.

    Raises SboraxError where adapters or optimisers do not have the same leaves.
    """
    for member, part in zip(members, parts, strict=True):
        _check_alike(members[0], member, (parts[0].train, parts[0].frozen), (part.train, part.frozen), "adapters have")
    structure = jax.tree.structure(parts[0].frozen)
    columns = list(zip(*(jax.tree.leaves(part.frozen) for part in parts), strict=True))
    is_shared = [procedure is None and all(_equal(leaf, column[0]) for leaf in column) for column in columns]

    def join(shared: list[Array], frozen: list[Array]) -> PyTree:
        common, individual = iter(shared), iter(frozen)
        return jax.tree.unflatten(structure, [next(common if flag else individual) for flag in is_shared])

    with_rates = [optimizer_of(member) for member in members]
    without_rates = [optimizer.without_rate() for optimizer in with_rates]
    distinct = tuple(dict.fromkeys(without_rates))
    txs = {optimizer: make_optimizer(optimizer, 1, procedure) for optimizer in distinct}
    opts = [jax.jit(txs[optimizer].init)(part.train) for optimizer, part in zip(without_rates, parts, strict=True)]
    opt_leaves = [jax.tree.leaves(opt) for opt in opts]
    for member, leaves in zip(members, opt_leaves, strict=True):
        _check_alike(members[0], member, opt_leaves[0], leaves, "optimisers keep")
    keys = [Streams.of(member.experiment.seed_adapter).dropout for member in members]
    folded = () if procedure is None else procedure.folded
    constants = MemberConstants(
        frozen=[jnp.stack(column) for column, flag in zip(columns, is_shared, strict=True) if not flag],
        key=jnp.stack(keys),
        lr=jnp.stack([rates(optimizer, steps) for optimizer in with_rates]),
        optimizer=jnp.asarray([distinct.index(optimizer) for optimizer in without_rates], jnp.int32),
        base={path: _stack([part.base[path] for part in parts]) for path in folded},
    )
    shared = [column[0] for column, flag in zip(columns, is_shared, strict=True) if flag]
    count = len(members)
    zero = jnp.zeros((count,), jnp.int32)
    run = TrainState(zero, _stack([part.train for part in parts]), _stack(opt_leaves))
    loss = members[0].experiment.loss
    stacked = StackedMembers(
        constants, shared, join, distinct, count, at_once, tuple(txs.values()), procedure, loss
    )  # fmt: skip
    return stacked, SweepState(run, jnp.zeros_like(zero))


def make_sweep_step(
    model: LanguageModel, stacked: StackedMembers
) -> Callable[[SweepState, MemberConstants, list[Array], Flat, dict[str, Any]], tuple[SweepState, dict[str, Any]]]:
    """The compiled step of all members on one batch: `step(state, constants, shared, base, batch)`.

    It returns `(state, numbers)`; numbers are those of a single step, with a leading axis of the members that go on.
    Only `state` is donated.
    """
    observe = stacked.procedure is not None and stacked.procedure.method.observes
    differentiated = () if stacked.procedure is None else stacked.procedure.differentiated
    folded = tuple(stacked.constants.base)

    def step(
        state: SweepState, constants: MemberConstants, shared: list[Array], base: Flat, batch: dict[str, Array]
    ) -> tuple[SweepState, dict[str, Any]]:
        def member_step(
            member: tuple[TrainState, Array, MemberConstants],
        ) -> tuple[TrainState, Array, dict[str, Any]]:
            before, diverged, of_member = member
            tx = make_member_optimizer(stacked.optimizers, of_member.lr, of_member.optimizer, stacked.procedure)
            frozen, weights = stacked.join(shared, of_member.frozen), {**base, **of_member.base}
            single = make_step(model, tx, of_member.key, observe, None, stacked.loss, differentiated, folded)
            after, numbers = single(before, frozen, weights, batch)
            watched = jnp.stack([numbers[name] for name in WATCHED])
            finite = jnp.all(jnp.isfinite(watched))
            running = (diverged == 0) & finite
            updated = jax.tree.map(lambda new, old: jnp.where(running, new, old), after, before)
            return updated, jnp.where((diverged == 0) & ~finite, after.step, diverged), numbers

        *after, numbers = stacked.over(member_step)(stacked.some((state.run, state.diverged, constants)))
        return SweepState(*stacked.replaced((state.run, state.diverged), tuple(after))), numbers

    return jax.jit(step, donate_argnums=0)


def make_sweep_evaluation(
    model: LanguageModel, stacked: StackedMembers
) -> Callable[..., tuple[Float[Array, " members"], Array, Float[Array, "members batch length"] | None]]:
    """The compiled evaluation of all members that go on, with a leading axis of these in every result.

    `(train, constants, shared, base, batch) -> (sums of losses, items, terms)`, as `make_evaluation` gives them.
    """
    evaluation = make_evaluation(model, stacked.loss, tuple(stacked.constants.base))

    @jax.jit
    def evaluate(train: PyTree, constants: MemberConstants, shared: list[Array], base: Flat, batch: dict[str, Array]):
        def member_evaluation(member: tuple[PyTree, list[Array], Flat]) -> tuple[Array, Array, Array | None]:
            train, frozen, kernels = member
            return evaluation(train, stacked.join(shared, frozen), {**base, **kernels}, batch)

        return stacked.over(member_evaluation)(stacked.some((train, constants.frozen, constants.base)))

    return evaluate


MemberLeaves = tuple[TrainState, list[Array], Flat]
"""The leaves of a member that can change: its state, and the frozen leaves and kernels that it does not share."""


def _leaves(stacked: StackedMembers, state: SweepState) -> MemberLeaves:
    """`MemberLeaves` of all members, with a leading axis of members."""
    return state.run, stacked.constants.frozen, stacked.constants.base


@jax.jit
def _take(members: PyTree, number: Int[Array, ""]) -> PyTree:
    """One member out of leaves with a leading axis of members."""
    return jax.tree.map(lambda leaf: leaf[number], members)


def member_of(stacked: StackedMembers, state: SweepState, base: Flat, number: int) -> tuple[TrainState, Parts]:
    """A member's state and constant parts, as a single run has them.

    - base: the part of the base that all members share.
    """
    run, frozen, kernels = _take(_leaves(stacked, state), jnp.int32(number))
    structure = jax.tree.structure(jax.eval_shape(stacked.tx(number).init, run.train))
    single = TrainState(run.step, run.train, jax.tree.unflatten(structure, run.opt))
    adapters, trained_base = run.train["adapters"], run.train["base"]
    return single, Parts(adapters, stacked.join(stacked.shared, frozen), {**base, **kernels}, trained_base)


@functools.partial(jax.jit, donate_argnums=0)
def _put(members: PyTree, number: Int[Array, ""], member: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, part: leaf.at[number].set(part), members, member)


def with_member(
    stacked: StackedMembers, state: SweepState, number: int, single: TrainState, parts: Parts
) -> tuple[StackedMembers, SweepState]:
    """The inverse of `member_of`: replace a member, in the buffers of `stacked` and `state`."""
    run = TrainState(single.step, single.train, jax.tree.leaves(single.opt))
    # A member is only replaced where a procedure acts, and there no frozen leaf is shared.
    leaves = run, jax.tree.leaves(parts.frozen), {path: parts.base[path] for path in stacked.constants.base}
    run, frozen, base = _put(_leaves(stacked, state), jnp.int32(number), leaves)
    constants = dataclasses.replace(stacked.constants, frozen=frozen, base=base)
    return dataclasses.replace(stacked, constants=constants), SweepState(run, state.diverged)


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _equal(left: Array, right: Array) -> bool:
    return left is right or np.array_equal(np.asarray(left), np.asarray(right))


def _check_alike(first: Member, member: Member, of_first: PyTree, of_member: PyTree, words: str) -> None:
    def form(tree: PyTree) -> Any:
        return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

    if form(of_first) != form(of_member):
        raise SboraxError(
            f"{first.name} and {member.name}: their {words} different leaves, as with and without dropout or momentum; "
            "members need the same ones, run one of the two alone"
        )
