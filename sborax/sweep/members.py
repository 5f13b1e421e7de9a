"""The members of a sweep as one program: what is theirs stacked, what they share once, the step over all of them."""

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
from sborax.train.step import WATCHED, make_loss, make_step
from sborax.train.streams import Streams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SweepState:
    """What a step changes. Every leaf has an axis of members in front.

    run: as of a single run, but that `opt` is the list of its leaves.
    diverged: int32, the step whose loss or gradient was not finite, 0 for a member that goes on. The state of a member
        that diverged stays as it was before that step.
    """

    run: Any
    diverged: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Own:
    """What is a member's own and constant, with an axis of members in front.

    frozen: those leaves of the adapters' frozen halves that differ between members, or may. key: of dropout.
    lr: learning rate of every step. rule: number of its optimiser among the different ones.
    base: kernels of the base by path that a procedure changes member by member.
    """

    frozen: Any
    key: Any
    lr: Any
    rule: Any
    base: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Crew:
    """All members. shared: frozen leaves that are the same in all. join: the frozen half from leaves of both kinds.

    txs: the optimiser of each of `rules`, without its learning rates. watch: what sees the gradients of every member
        first. observe: whether it is given norms of inputs.
    """

    own: Own
    shared: list[Array]
    join: Callable[[list[Array], list[Array]], PyTree]
    rules: tuple[AbstractOptimizer, ...]
    count: int
    at_once: int
    txs: tuple[optax.GradientTransformation, ...] = ()
    watch: optax.GradientTransformation | None = None
    observe: bool = False
    loss: AbstractLoss = CrossEntropy()

    def tx(self, number: int) -> optax.GradientTransformation:
        """The optimiser of a member, without its learning rates."""
        return self.txs[int(self.own.rule[number])]

    def over(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """`function` of one member, for all: `at_once` of them together."""
        if self.at_once >= self.count:
            return jax.vmap(function)
        if self.at_once == 1:
            return lambda members: jax.lax.map(function, members)
        return lambda members: jax.lax.map(function, members, batch_size=self.at_once)


def rates(optimizer: AbstractOptimizer, steps: int) -> Float[Array, " steps"]:
    """The learning rate of every step of a run."""
    each = optimizer.rate(steps)(jnp.arange(steps, dtype=jnp.int32))
    return jnp.broadcast_to(jnp.asarray(each, jnp.float32), (steps,))


def optimizer_of(member: Member) -> AbstractOptimizer:
    """The optimiser of a member, which a sweep has checked."""
    optimizer = member.experiment.optimizer
    assert isinstance(optimizer, AbstractOptimizer)
    return optimizer


def make_member_optimizer(
    rules: Sequence[AbstractOptimizer],
    lr: Float[Array, " steps"],
    rule: Int[Array, ""],
    watch: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimiser of one member: `rules[rule]` on its own learning rates. Its state is a list of leaves.

    The numbers of every rule are constants of the program, as in a single run.
    """
    made = [optax.with_extra_args_support(make_optimizer(one, 1, watch, lambda count: lr[count])) for one in rules]

    def update(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, list[Array]]:
        def branch(tx: optax.GradientTransformationExtraArgs) -> Callable[[], tuple[PyTree, list[Array]]]:
            structure = jax.tree.structure(jax.eval_shape(tx.init, params))

            def apply() -> tuple[PyTree, list[Array]]:
                new, after = tx.update(updates, jax.tree.unflatten(structure, state), params, **extra)
                return new, jax.tree.leaves(after)

            return apply

        branches = [branch(tx) for tx in made]
        return branches[0]() if len(branches) == 1 else jax.lax.switch(rule, branches)

    return optax.GradientTransformationExtraArgs(lambda params: jax.tree.leaves(made[0].init(params)), update)


def gather(
    members: Sequence[Member], each: Sequence[Parts], steps: int, at_once: int, procedure: ActiveProcedure | None = None
) -> tuple[Crew, SweepState]:
    """Members with their parts as one crew, and its state before the first step.

    procedure: of one member. It may change any frozen leaf.
    Raises SboraxError where adapters or optimisers do not have the same leaves.
    """
    for member, parts in zip(members, each, strict=True):
        _check_alike(members[0], member, (each[0].train, each[0].frozen), (parts.train, parts.frozen), "adapters have")
    structure = jax.tree.structure(each[0].frozen)
    columns = list(zip(*(jax.tree.leaves(parts.frozen) for parts in each), strict=True))
    same = [procedure is None and all(_equal(leaf, column[0]) for leaf in column) for column in columns]

    def join(shared: list[Array], own: list[Array]) -> PyTree:
        common, theirs = iter(shared), iter(own)
        return jax.tree.unflatten(structure, [next(common) if once else next(theirs) for once in same])

    given = [optimizer_of(member) for member in members]
    optimizers = [optimizer.without_rate() for optimizer in given]
    rules = tuple(dict.fromkeys(optimizers))
    watch = None if procedure is None else procedure.watch()
    txs = {one: make_optimizer(one, 1, watch) for one in rules}
    opts = [jax.jit(txs[one].init)(parts.train) for one, parts in zip(optimizers, each, strict=True)]
    leaves = [jax.tree.leaves(opt) for opt in opts]
    for member, own in zip(members, leaves, strict=True):
        _check_alike(members[0], member, leaves[0], own, "optimisers keep")
    keys = [Streams.of(member.experiment.seed_adapter).dropout for member in members]
    folded = () if procedure is None else procedure.folded
    own = Own(
        frozen=[jnp.stack(column) for column, once in zip(columns, same, strict=True) if not once],
        key=jnp.stack(keys),
        lr=jnp.stack([rates(optimizer, steps) for optimizer in given]),
        rule=jnp.asarray([rules.index(one) for one in optimizers], jnp.int32),
        base={path: _stack([parts.base[path] for parts in each]) for path in folded},
    )
    shared = [column[0] for column, once in zip(columns, same, strict=True) if once]
    count = len(members)
    zero = jnp.zeros((count,), jnp.int32)
    run = TrainState(zero, _stack([parts.train for parts in each]), _stack(leaves))
    observe = procedure is not None and procedure.method.observes
    loss = members[0].experiment.loss
    crew = Crew(own, shared, join, rules, count, at_once, tuple(txs.values()), watch, observe, loss)
    return crew, SweepState(run, jnp.zeros_like(zero))


def make_sweep_step(
    model: LanguageModel, crew: Crew
) -> Callable[[SweepState, Own, list[Array], Flat, dict[str, Any]], tuple[SweepState, dict[str, Any]]]:
    """The compiled step of all members on one batch: `step(state, own, shared, base, batch) -> (state, numbers)`.

    numbers: as of a single step, with an axis of members. Only `state` is donated.
    """

    def step(state: SweepState, own: Own, shared: list[Array], base: Flat, batch: dict[str, Array]):
        def one(member: tuple[TrainState, Array, Own]) -> tuple[TrainState, Array, dict[str, Any]]:
            before, diverged, mine = member
            tx = make_member_optimizer(crew.rules, mine.lr, mine.rule, crew.watch)
            frozen, weights = crew.join(shared, mine.frozen), {**base, **mine.base}
            single = make_step(model, tx, mine.key, crew.observe, loss=crew.loss)
            after, numbers = single(before, frozen, weights, batch)
            watched = jnp.stack([numbers[name] for name in WATCHED])
            finite = jnp.all(jnp.isfinite(watched))
            going = (diverged == 0) & finite
            kept = jax.tree.map(lambda new, old: jnp.where(going, new, old), after, before)
            return kept, jnp.where((diverged == 0) & ~finite, after.step, diverged), numbers

        run, diverged, numbers = crew.over(one)((state.run, state.diverged, own))
        return SweepState(run, diverged), numbers

    return jax.jit(step, donate_argnums=0)


def make_sweep_loss(model: LanguageModel, crew: Crew) -> Callable[..., tuple[Float[Array, " members"], Array]]:
    """The compiled evaluation of all members: `(train, own, shared, base, batch) -> (sums of losses, tokens)`."""
    loss = make_loss(model, crew.loss)

    @jax.jit
    def losses(train: PyTree, own: Own, shared: list[Array], base: Flat, batch: dict[str, Array]):
        def one(member: tuple[PyTree, list[Array], Flat]) -> tuple[Array, Array]:
            train, frozen, kernels = member
            return loss(train, crew.join(shared, frozen), {**base, **kernels}, batch)

        return crew.over(one)((train, own.frozen, own.base))

    return losses


Theirs = tuple[TrainState, list[Array], Flat]
"""What changes of a member: its state, and its frozen leaves and kernels that are not shared."""


def stacked(crew: Crew, state: SweepState) -> Theirs:
    """`Theirs` with an axis of members in front."""
    return state.run, crew.own.frozen, crew.own.base


@jax.jit
def one_of(members: PyTree, number: Int[Array, ""]) -> PyTree:
    """One member of leaves with an axis of members in front."""
    return jax.tree.map(lambda leaf: leaf[number], members)


def member_of(crew: Crew, state: SweepState, base: Flat, number: int) -> tuple[TrainState, Parts]:
    """A member's state and constant parts, as a single run has them. base: what all members share of it."""
    run, frozen, kernels = one_of(stacked(crew, state), jnp.int32(number))
    structure = jax.tree.structure(jax.eval_shape(crew.tx(number).init, run.train))
    single = TrainState(run.step, run.train, jax.tree.unflatten(structure, run.opt))
    adapters, trained_base = run.train["adapters"], run.train["base"]
    return single, Parts(adapters, crew.join(crew.shared, frozen), {**base, **kernels}, trained_base)


@functools.partial(jax.jit, donate_argnums=0)
def _replaced(members: PyTree, number: Int[Array, ""], one: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf, own: leaf.at[number].set(own), members, one)


def with_member(
    crew: Crew, state: SweepState, number: int, single: TrainState, parts: Parts
) -> tuple[Crew, SweepState]:
    """The inverse of `member_of`: one member is another, in the buffers of `crew` and `state`."""
    run = TrainState(single.step, single.train, jax.tree.leaves(single.opt))
    # Where something acts on members, no frozen leaf is shared.
    theirs = run, jax.tree.leaves(parts.frozen), {path: parts.base[path] for path in crew.own.base}
    run, frozen, base = _replaced(stacked(crew, state), jnp.int32(number), theirs)
    own = dataclasses.replace(crew.own, frozen=frozen, base=base)
    return dataclasses.replace(crew, own=own), SweepState(run, state.diverged)


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _equal(one: Array, other: Array) -> bool:
    return one is other or np.array_equal(np.asarray(one), np.asarray(other))


def _check_alike(first: Member, member: Member, one: PyTree, other: PyTree, what: str) -> None:
    def form(tree: PyTree) -> Any:
        return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]

    if form(one) != form(other):
        raise SboraxError(
            f"{first.name} and {member.name}: their {what} different leaves, as with and without dropout or momentum; "
            "members need the same ones, run one of the two alone"
        )
