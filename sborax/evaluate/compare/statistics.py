"""Intervals and Pareto fronts of a comparison."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

LEVEL = 0.95
RESAMPLES = 4000
"""Bootstrap samples of an interval over items."""
GATHERED = 1 << 22
"""Numbers that are gathered at once while items are resampled."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval.

    - value: the mean.
    - low, high: ends of the interval; None where there are fewer than two draws.
    - over: what would be drawn anew: "items" or "seeds".
    - draws: how many of these the mean is over.
    """

    value: float
    low: float | None
    high: float | None
    over: Literal["items", "seeds"]
    draws: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval is known and 0 lies outside of it."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def over_items(
    values: Float[np.ndarray, "groups items"], reference: int | None = None, seed: int = 0
) -> tuple[list[Interval], list[Interval]]:
    """Intervals of each group's mean over items, and of its difference from the reference group, by paired bootstrap.

    All groups were scored on the same items, so every bootstrap sample draws the same items for all of them
    (`scipy.stats.bootstrap` of the last axis). What items share, such as how hard each is, cancels in a difference.
    Where a group has several seeds, an item's value is its mean over these: the interval is that of other items for the
    same seeds. It says nothing about other seeds; `over_seeds` does.

    Ends are percentiles at the level Phi(sqrt(n / (n - 1)) t), with the quantile t of Student's distribution, which
    corrects for few items (Hesterberg, arXiv:1411.5279, section 4.3).

    Args:
    - values: one row a group, one column an item.
    - reference: the row that differences are taken from; None for no differences.
    - seed: of the bootstrap samples.
    """
    count = values.shape[1]
    means = values.mean(axis=1)
    gaps = means - means[reference] if reference is not None else np.zeros(0)
    if count < 2:
        return (
            [Interval(float(mean), None, None, "items", count) for mean in means],
            [Interval(float(gap), None, None, "items", count) for gap in gaps],
        )
    samples = stats.bootstrap(
        (values,),
        np.mean,
        axis=-1,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, GATHERED // values.size),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    below = float(stats.norm.cdf(math.sqrt(count / (count - 1)) * stats.t.ppf((1.0 - LEVEL) / 2, count - 1)))

    def intervals(centres: np.ndarray, resampled: np.ndarray) -> list[Interval]:
        ends = np.quantile(resampled, (below, 1.0 - below), axis=-1).T
        return [
            Interval(float(centre), float(low), float(high), "items", count)
            for centre, (low, high) in zip(centres, ends, strict=True)
        ]

    between = intervals(gaps, samples - samples[reference]) if reference is not None else []
    return intervals(means, samples), between


def over_seeds(values: Sequence[float]) -> Interval:
    """The interval of a mean over seeds: mean +- t s / sqrt(n), with n - 1 degrees of freedom.

    Used for numbers that are known for a run as one value. Seeds are few: a bootstrap that draws from three of them
    covers the true mean in about three cases of four. Student's distribution covers it in 95 of 100, as it should, as
    long as scores are about normally distributed.

    Args:
    - values: the score of each seed.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, None, None, "seeds", count)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return _student(mean, error, count - 1, count)


def seed_difference(values: Mapping[tuple[int, int], float], reference: Mapping[tuple[int, int], float]) -> Interval:
    """The interval of a difference of two means over seeds.

    Paired by seed where both groups have the same seeds (a seed sets the order of the data, which both then share);
    otherwise by Welch's t with unequal variances.

    Args:
    - values, reference: scores by seed, those of the data and of the adapter.
    """
    if values.keys() == reference.keys():
        return over_seeds([values[seed] - reference[seed] for seed in values])
    gap = float(np.mean(list(values.values())) - np.mean(list(reference.values())))
    counts = len(values), len(reference)
    if min(counts) < 2:
        return Interval(gap, None, None, "seeds", min(counts))
    squares = [
        float(np.var(list(scores.values()), ddof=1)) / count
        for scores, count in zip((values, reference), counts, strict=True)
    ]
    total = sum(squares)
    degrees = sum(square**2 / (count - 1) for square, count in zip(squares, counts, strict=True))
    return _student(gap, math.sqrt(total), total**2 / degrees if degrees else math.inf, min(counts))


def _student(mean: float, error: float, degrees: int | float, count: int) -> Interval:
    reach = error * float(stats.t.ppf((1.0 + LEVEL) / 2, degrees))
    return Interval(mean, mean - reach, mean + reach, "seeds", count)


def front(scores: Sequence[float], costs: Sequence[int | float | None], lower: bool) -> list[bool]:
    """Which points are on the Pareto front: no other is as good and as cheap, and better in one of the two.

    Args:
    - scores: one a point.
    - costs: one a point, lower is better; a point with None is never on the front.
    - lower: whether lower scores are better.
    """
    points = [
        None if cost is None or not math.isfinite(score) else (score if lower else -score, cost)
        for score, cost in zip(scores, costs, strict=True)
    ]
    priced = [point for point in points if point is not None]
    return [
        point is not None and not any(o[0] <= point[0] and o[1] <= point[1] and o != point for o in priced)
        for point in points
    ]
