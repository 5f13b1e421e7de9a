"""How an arm was tuned: the pieces it needs, its best learning rate, and its losses there."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments.studies.store import Store
from experiments.studies.study import Arm, Base, Piece, Study
from sborax.sweep.rates import Sensitivity, extension, midpoints, sensitivity

Numbers = Mapping[str, Any]
"""What a result holds of a member."""
KINDS = ("items", "kept")
"""Its losses: of held-out items, and of text that the base knew."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """An arm with all results that it needs.

    - members: by learning rate and seed.
    - tuning: the seeds with which all rates were tried.
    - extensions: how often rates were added.
    - digests: of the items.
    - before: losses of the `kept` items before training; None where they are not known.
    """

    arm: Arm
    members: Mapping[float, Mapping[int, Numbers]]
    tuning: tuple[int, ...]
    extensions: int
    digests: str
    before: tuple[float, ...] | None = None

    @cached_property
    def rates(self) -> Sensitivity:
        """The loss of the selecting items by learning rate, a mean over seeds."""
        return selected(self.members, self.tuning)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that reached the end at the best rate."""
        return tuple(self.at_best)

    @property
    def best(self) -> float:
        """The best learning rate. Raises ValueError where every rate diverged."""
        if self.rates.best is None:
            raise ValueError(f"{self.arm.name}: diverged at every learning rate")
        return self.rates.best

    @property
    def at_best(self) -> Mapping[int, Numbers]:
        """The members at the best learning rate, by seed, without those that diverged."""
        return {seed: numbers for seed, numbers in self.members[self.best].items() if "items" in numbers}

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return next(iter(self.at_best.values()))["trained"]

    def losses(self, kind: str = "items") -> Float[np.ndarray, "seeds items"]:
        """Losses at the best rate in nats a token: of the reported items, or of all `kept` ones."""
        return np.array([_losses(numbers, kind) for numbers in self.at_best.values()])

    def forgotten(self) -> Float[np.ndarray, "seeds items"] | None:
        """Losses of the `kept` items at the best rate, minus those before training; None where these are not known."""
        return None if self.before is None else self.losses("kept") - np.array(self.before)

    def forgotten_by_rate(self) -> list[tuple[float, float, float]]:
        """Learning rate, loss of the reported items and loss of the `kept` ones minus that before, for each rate.

        Means over the seeds with which all rates were tried, without rates at which one diverged. Empty where the loss
        before training is not known.
        """
        if self.before is None:
            return []
        rows = []
        for rate in self.rates.rates:
            members = [self.members[rate][seed] for seed in self.tuning]
            if all("items" in numbers for numbers in members):
                loss, kept = (float(np.mean([_losses(numbers, kind) for numbers in members])) for kind in KINDS)
                rows.append((rate, loss, kept - float(np.mean(self.before))))
        return rows

    def numbers(self, name: str) -> Float[np.ndarray, "seeds 1"]:
        """A number of the run at the best rate, such as the `area` under the training curve over its steps."""
        return np.array([[numbers[name]] for numbers in self.at_best.values()])

    def best_by_seed(self) -> dict[int, float]:
        """log10 of the best rate of each seed alone: the minimum of a parabola through the three rates around it."""
        return {seed: _minimum(selected(self.members, (seed,))) for seed in self.tuning}


def _losses(numbers: Numbers, kind: str) -> list[float]:
    """Losses of a member: of the reported half of the items, or of all `kept` ones."""
    return numbers[kind][1::2] if kind == "items" else numbers[kind]


def selected(members: Mapping[float, Mapping[int, Numbers]], seeds: Sequence[int]) -> Sensitivity:
    """The mean loss of the selecting items by learning rate. A rate at which a seed diverged is infinitely bad."""

    def score(by_seed: Mapping[int, Numbers]) -> float:
        means = [float(np.mean(by_seed[seed]["items"][::2])) for seed in seeds if "items" in by_seed[seed]]
        return float(np.mean(means)) if len(means) == len(seeds) else math.inf

    by_rate = {rate: by_seed for rate, by_seed in members.items() if all(seed in by_seed for seed in seeds)}
    return sensitivity({rate: score(by_seed) for rate, by_seed in by_rate.items()}, lower=True)


def _minimum(rates: Sensitivity) -> float:
    """log10 of the best rate. NaN where every rate diverged, the rate itself at an end."""
    if rates.best is None:
        return math.nan
    place = rates.rates.index(rates.best)
    around = slice(place - 1, place + 2)
    points, scores = np.log10(rates.rates[around]), np.array(rates.scores[around])
    if not rates.interior or not np.isfinite(scores).all():
        return float(np.log10(rates.best))
    curve = np.polyfit(points - points[1], scores, 2)
    return float(points[1] - curve[1] / (2 * curve[0])) if curve[0] > 0 else float(points[1])


def progress(study: Study, arm: Arm, store: Store) -> tuple[list[Piece], Tuned | None]:
    """The pieces of an arm as far as they are known, and its tuning once none is pending.

    Pieces beyond the first rates are known once the results that call for them are there.
    """
    pieces = [Piece(arm, study.rates, seed) for seed in study.tuning]
    extensions = 0
    while all(store.get(piece) for piece in pieces):
        rates = selected(_members(pieces, store), study.tuning)
        rate = extension(rates)
        if rate is None or extensions == study.extensions:
            break
        pieces += [Piece(arm, (rate,), seed) for seed in study.tuning]
        extensions += 1
    else:
        return pieces, None
    if study.refined and (between := midpoints(rates)):
        pieces += [Piece(arm, between, seed) for seed in study.tuning]
        if not all(store.get(piece) for piece in pieces):
            return pieces, None
        rates = selected(_members(pieces, store), study.tuning)
    if rates.best is not None:
        pieces += [Piece(arm, (rates.best,), seed) for seed in study.seeds if seed not in study.tuning]
    results = [store.get(piece) for piece in pieces]
    if not all(results):
        return pieces, None
    marks = {result["items_digests"] for result in results if result}
    if len(marks) > 1:
        raise ValueError(f"{study.name}, {arm.setting}, {arm.name}: pieces were measured on different items")
    before = _before(study, arm, store, [result for result in results if result])
    return pieces, Tuned(arm, _members(pieces, store), study.tuning, extensions, marks.pop(), before)


def _before(study: Study, arm: Arm, store: Store, results: Sequence[Mapping[str, Any]]) -> tuple[float, ...] | None:
    """The losses of an arm's kept text before training."""
    base = Base.of(arm)
    measured = None if base is None else store.get(base)
    if measured is None:
        return None
    if any(result["kept_digests"] != measured["kept_digests"] for result in results):
        raise ValueError(f"{study.name}, {arm.setting}, {arm.name}: kept text differs from that of the base")
    return tuple(measured["kept"])


def _members(pieces: Sequence[Piece], store: Store) -> dict[float, dict[int, Numbers]]:
    members: dict[float, dict[int, Numbers]] = {}
    for piece in pieces:
        result = store.get(piece)
        for numbers in result["members"] if result else ():
            members.setdefault(numbers["lr"], {})[piece.seed] = numbers
    return members


def pending(study: Study, store: Store) -> list[Piece]:
    """The pieces without a result that are known now, in the order in which they are run."""
    return [piece for arm in study.arms for piece in progress(study, arm, store)[0] if not store.get(piece)]
