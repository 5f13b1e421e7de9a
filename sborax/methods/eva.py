"""EVA: Explained Variance Adaptation, a start from the principal components of the inputs, arXiv:2410.07170."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from sborax.adapters.core import (
    AbstractFactored,
    Adapter,
    Axes,
    Context,
    Fitted,
    Hint,
    Leaves,
    Rank,
    SboraxError,
    Weight,
    check_rank,
    dropout_leaf,
    hyper,
    live,
    width,
)
from sborax.adapters.informed import AbstractInformed, Gathered, Inputs, Place
from sborax.methods.lowrank import PAIR_AXES, pair_delta, pair_weight, principal, scaling


@dataclasses.dataclass(frozen=True)
class EVA(AbstractFactored, AbstractInformed):
    """y = x W + s (x a) b, where a starts as the leading principal components of x on the data, and b = 0.

    Ranks follow the data: the components of all weights that explain most of their inputs' variance get the ranks.

    rank: mean rank of the weights (default 8). Ranks by layer are kept as they are.
    alpha: s = alpha / rank for the mean rank, whatever ranks the weights get; None (default) is s = 1.
    adjust: False divides alpha by the rank of each weight instead (PEFT: `adjust_scaling_factors`; default True).
    rho: a weight gets rho rank at most, and perhaps no adapter (default 2, PEFT's); 1 leaves all ranks equal.
    tau: components are found once a batch turns none in use by more than this cosine (default 0.99, PEFT's).
    whiten: divide each component by the root of its singular value; default False. PEFT divides again for every
        projection that shares the inputs, in place; here it is once.
    niter: None (default) for exact decompositions, else subspace iterations of randomised ones of twice the width
        (PEFT: 4, from torch's seed 42).
    dropout: rate on the adapter's input in training (default 0).
    mean: the rank by which alpha is divided, once the data have chosen the ranks; leave it None.

    Needs `Hint.inputs`, see `input_hints`. The components are those of the inputs less their mean, by incremental
    decomposition of one batch after another, again from the first one until all have settled. Inputs of answers alone
    count, as in PEFT; where projections share their inputs, ties go to the first of them. Identity at init. Exact merge
    W + s a b. Trained parameters: rank (in + out).
    """

    paper = "Parameter Efficient Fine-tuning via Explained Variance Adaptation, arXiv:2410.07170"
    group_b = frozenset({"b"})
    ragged = True
    pair = True
    needs = frozenset({"inputs"})
    joint = True

    rank: Rank = 8
    alpha: float | None = hyper(None, above=0.0)
    adjust: bool = True
    rho: float = 2.0
    tau: float = 0.99
    whiten: bool = False
    niter: int | None = None
    dropout: float = hyper(0.0)
    mean: int | None = None

    @property
    def axes(self) -> Axes:
        return PAIR_AXES

    def check(self, shape: tuple[int, int]) -> None:
        # A component more is no use beyond the inputs, but it may be beyond the outputs.
        check_rank(self.rank, shape[0], "the inputs")
        if not 1.0 <= self.rho or not 0.0 < self.tau < 1.0:
            raise SboraxError(f"rho must be at least 1 and tau in (0, 1), got {self.rho} and {self.tau}")

    def blank(self, shape: tuple[int, int]) -> Leaves:
        count = min(self._most(0), shape[0])
        return {"components": jnp.zeros((count, shape[0])), "singular": jnp.ones(count)}

    def init(self, key: Key[Array, ""], weight: Weight, hint: Hint) -> Fitted:
        assert hint.inputs is not None
        wide = width(self.rank)
        components = jnp.asarray(hint.inputs["components"], jnp.float32)[:wide]
        if len(components) < wide:
            raise SboraxError(f"EVA: rank {wide} needs as many components of the inputs, got {len(components)}")
        if self.whiten:
            components = components / jnp.sqrt(jnp.asarray(hint.inputs["singular"], jnp.float32)[:wide, None])
        _, mask = live(self.rank, hint)
        # A rank of 0 leaves no component, whatever its whitened length.
        a = jnp.where(mask[None, :] > 0, components.T, 0.0)
        scale = scaling(self.alpha, self.rank if self.mean is None or not self.adjust else self.mean, hint)
        return Fitted({"a": a, "b": jnp.zeros((wide, weight.shape[1]))}, {"scale": scale, **dropout_leaf(self.dropout)})

    def add_to(
        self, y: Float[Array, "tokens out"], x: Float[Array, "tokens in"], adapter: Adapter, ctx: Context
    ) -> Float[Array, "tokens out"]:
        return y + pair_delta(x, adapter, ctx)

    def add_to_weight(self, weight: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
        return weight + pair_weight(adapter.train["a"], adapter.train["b"], adapter.frozen["scale"])

    def factors(
        self, adapter: Adapter, shape: tuple[int, int]
    ) -> tuple[Float[Array, "in rank"], Float[Array, "rank out"]]:
        return adapter.frozen["scale"] * adapter.train["a"], adapter.train["b"]

    @classmethod
    def gather(
        cls, methods: Mapping[Place, AbstractInformed], batches: Sequence[Callable[[], Inputs]]
    ) -> dict[Place, Gathered]:
        search = _Search({place: cast(EVA, method) for place, method in methods.items()}, batches[0]())
        taken = 0
        for number in itertools.cycle(range(len(batches))):
            active = search.unsettled()
            if not active:
                break
            if taken == MOST_BATCHES:
                raise SboraxError(
                    f"EVA: the components of {active[0][0]} still turn after {taken} batches; lower tau, or raise "
                    "hint_batches"
                )
            search.take(active, batches[number]())
            taken += 1
            if taken == len(batches) and not search.complete:
                raise SboraxError(
                    f"EVA: no batch has as many tokens of answers as {active[0][0]} may have ranks, "
                    f"{search.most[active[0]]}; use larger batches, or lower rank or rho"
                )
        return search.gathered()

    def with_ranks(self, ranks: Rank) -> "EVA":
        mean = self.rank if isinstance(self.rank, int) else self.mean
        return dataclasses.replace(self, rank=ranks, mean=mean, rho=1.0)

    def _most(self, position: int) -> int:
        """The largest rank that the weight at a position of the stack may get."""
        return round(self._rank(position) * self.rho) if isinstance(self.rank, int) else self._rank(position)

    def _rank(self, position: int) -> int:
        return self.rank[position] if isinstance(self.rank, tuple) else width(self.rank)


MOST_BATCHES = 1000
"""PEFT takes batches until all components have settled, without a bound."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Spectrum:
    """The principal components of the inputs seen so far.

    - components: of unit length, by falling singular value.
    - singular: singular values of the inputs less their mean.
    - mean, spread: the mean of the inputs, and the sum of the squares of their distances from it.
    - seen: how many inputs.
    - turned: the cosine between each component and the one before the last batch.
    """

    components: Float[Array, "n in"]
    singular: Float[Array, " n"]
    mean: Float[Array, " in"]
    spread: Float[Array, ""]
    seen: Float[Array, ""]
    turned: Float[Array, " n"]


@functools.partial(jax.jit, static_argnames="niter")
def _updated(old: _Spectrum, x: Float[Array, "tokens in"], kept: Float[Array, " tokens"], niter: int | None):
    """The components of the inputs so far and those rows of `x` that are kept (Ross et al. 2008)."""
    with jax.default_matmul_precision("highest"):
        count, new = old.components.shape[0], jnp.sum(kept)
        mean = kept @ x / new
        centred = (x - mean[None]) * kept[:, None]
        both = old.seen + new
        between = jnp.sqrt(old.seen * new / both) * (old.mean - mean)
        rows = jnp.concatenate([old.singular[:, None] * old.components, centred, between[None]])
        _, singular, components = principal(jax.random.key(42), rows, min(2 * count, *rows.shape), niter)
        components, singular = components[:count], singular[:count]
        # PEFT's signs, of which it takes the cosine.
        largest = jnp.argmax(jnp.abs(components), axis=1, keepdims=True)
        components = components * jnp.sign(jnp.take_along_axis(components, largest, axis=1))
        lengths = jnp.linalg.norm(components, axis=1) * jnp.linalg.norm(old.components, axis=1)
        return _Spectrum(
            components,
            singular,
            (old.seen * old.mean + new * mean) / both,
            old.spread + jnp.sum(centred**2) + jnp.sum(between**2),
            both,
            jnp.sum(components * old.components, axis=1) / jnp.maximum(lengths, 1e-8),
        )


class _Search:
    """The components of all weights while batches come in, and the ranks that follow from them.

    Weights with equal inputs, such as the query, key and value of a layer, share the search of the first of them.
    """

    def __init__(self, methods: Mapping[Place, EVA], first: Inputs) -> None:
        """- first: a batch, which tells which weights have equal inputs."""
        self.methods = methods
        self.most = {(path, i): method._most(i) for (path, i), method in methods.items()}
        self.leaders: dict[Place, Place] = {}
        self.found: dict[Place, _Spectrum] = {}
        self.settled: dict[Place, np.ndarray] = {}
        by_inputs: dict[bytes, Place] = {}
        for place in methods:
            rows = np.asarray(first.rows[place[0]][place[1]])
            self.leaders[place] = by_inputs.setdefault(hashlib.sha256(rows.tobytes()).digest(), place)
            leader = self.leaders[place]
            self.most[leader] = min(max(self.most[leader], self.most[place]), rows.shape[-1])
            self.settled[leader] = np.zeros(self.most[leader], bool)
        for place, leader in self.leaders.items():
            self.most[place] = self.most[leader]
        self.open = {place for place, method in methods.items() if isinstance(method.rank, int) and method.rho > 1.0}
        self.ranks = {
            place: most if place in self.open else method._rank(place[1])
            for (place, method), most in zip(methods.items(), self.most.values(), strict=True)
        }

    @property
    def complete(self) -> bool:
        """Whether every search has seen a batch."""
        return self.found.keys() == self.settled.keys()

    def unsettled(self) -> list[Place]:
        """The weights whose components in use still turn."""
        used = {leader: 0 for leader in self.settled}
        for place, leader in self.leaders.items():
            used[leader] = max(used[leader], self.ranks[place])
        return [place for place, settled in self.settled.items() if not settled[: used[place]].all()]

    def take(self, places: Sequence[Place], batch: Inputs) -> None:
        """Take the inputs of a batch into the components of some weights, and deal out the ranks again."""
        kept = jnp.asarray((batch.real & batch.answers).reshape(-1), jnp.float32)
        for place in places:
            path, position = place
            x = jnp.asarray(batch.rows[path][position], jnp.float32)
            x = x.reshape(-1, x.shape[-1])
            count, method = self.most[place], self.methods[place]
            if float(kept.sum()) < count:
                continue
            before = self.found.get(place)
            old = _untouched(count, x.shape[-1]) if before is None else before
            self.found[place] = new = _updated(old, x, kept, method.niter)
            if before is not None:
                self.settled[place] = np.asarray(new.turned) >= method.tau
        if self.complete and self.open:
            self._deal()

    def _deal(self) -> None:
        """Give the ranks to the components that explain the largest shares of their inputs' variance."""
        shares = {
            leader: np.asarray(found.singular**2 / jnp.maximum(found.spread, 1e-30))
            for leader, found in self.found.items()
        }
        # The order decides between equal shares.
        places = sorted(self.open, key=lambda place: (self.leaders[place] != place, list(self.methods).index(place)))
        owners = [place for place in places for _ in shares[self.leaders[place]]]
        order = np.argsort(-np.concatenate([shares[self.leaders[place]] for place in places]), kind="stable")
        budget = sum(self.methods[place]._rank(place[1]) for place in places)
        self.ranks |= dict.fromkeys(places, 0)
        for number in order[:budget]:
            self.ranks[owners[number]] += 1

    def gathered(self) -> dict[Place, Gathered]:
        """The components of every weight, filled up with zeros to one number, and its rank."""
        most, gathered = max(self.most.values()), {}
        for place, leader in self.leaders.items():
            found = self.found[leader]
            missing = most - len(found.singular)
            components = np.pad(np.asarray(found.components), ((0, missing), (0, 0)))
            singular = np.pad(np.asarray(found.singular), (0, missing), constant_values=1.0)
            rank = self.ranks[place] if self.open else None
            gathered[place] = Gathered({"components": components, "singular": singular}, rank)
        return gathered


def _untouched(count: int, features: int) -> _Spectrum:
    """Before the first batch."""
    zero = jnp.zeros(())
    rows, each = jnp.zeros((count, features)), jnp.zeros(count)
    return _Spectrum(rows, each, jnp.zeros(features), zero, zero, each)
