"""Statistics of a comparison, on synthetic data of which the truth is known."""

import math

import numpy as np
import pytest

from sborax.evaluate.compare.statistics import (
    front,
    over_items,
    over_seeds,
    seed_difference,
)
from sborax.sweep.rates import sensitivity

pytestmark = pytest.mark.quick
TRIALS = 600
TOLERANCE = 0.03
"""Of the share of intervals that hold the truth, whose own standard error is 0.009 here."""


def covered(intervals, truth):
    """The share of intervals that hold the truth."""
    return np.mean([interval.low <= truth <= interval.high for interval in intervals])


@pytest.mark.parametrize("count", [20, 80])
@pytest.mark.parametrize("kind", ["normal", "accuracy", "loss"])
def test_intervals_over_items_cover_95_percent(kind, count):
    random = np.random.default_rng(0)
    draws = {
        "normal": lambda: random.normal(1.0, 2.0, (TRIALS, count)),
        "accuracy": lambda: random.binomial(1, 0.6, (TRIALS, count)).astype(float),
        "loss": lambda: random.gamma(4.0, 0.25, (TRIALS, count)),
    }
    truth = {"normal": 1.0, "accuracy": 0.6, "loss": 1.0}[kind]
    # Groups are resampled together, which leaves the coverage of each alone.
    intervals, _ = over_items(draws[kind]())
    assert covered(intervals, truth) == pytest.approx(0.95, abs=TOLERANCE)


def test_intervals_of_paired_differences_cover_95_percent():
    random = np.random.default_rng(1)
    hits = []
    for trial in range(200):
        hard = random.normal(0.0, 3.0, 50)
        values = np.stack([hard + random.normal(0.0, 0.5, 50), hard + 0.2 + random.normal(0.0, 0.5, 50)])
        _, (_, between) = over_items(values, reference=0, seed=trial)
        hits.append(between.low <= 0.2 <= between.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.05)


def test_pairs_narrow_the_interval():
    random = np.random.default_rng(2)
    hard = random.normal(0.0, 3.0, 100)
    paired = np.stack([hard, hard + random.normal(0.3, 0.5, 100)])
    shuffled = np.stack([hard, random.permutation(paired[1])])
    width = [
        interval.high - interval.low
        for values in (paired, shuffled)
        for interval in over_items(values, reference=0)[1][1:]
    ]
    assert width[0] < width[1] / 4
    (_, better), (_, unclear) = (over_items(values, reference=0)[1] for values in (paired, shuffled))
    assert better.value == pytest.approx(unclear.value) and better.excludes_zero and not unclear.excludes_zero


def test_a_group_does_not_differ_from_itself():
    values = np.random.default_rng(3).normal(size=(3, 10))
    _, between = over_items(values, reference=1)
    assert (between[1].value, between[1].low, between[1].high) == (0.0, 0.0, 0.0)
    assert not between[1].excludes_zero


def test_items_that_are_all_alike_have_an_interval_of_no_width():
    (interval,), _ = over_items(np.ones((1, 5)))
    assert (interval.value, interval.low, interval.high, interval.draws) == (1.0, 1.0, 1.0, 5)


def test_intervals_do_not_depend_on_the_other_groups_nor_on_the_run():
    values = np.random.default_rng(4).normal(size=(3, 30))
    intervals = [over_items(values)[0][0], over_items(values[:1])[0][0], over_items(values, reference=2)[0][0]]
    ends = np.array([(interval.value, interval.low, interval.high) for interval in intervals])
    np.testing.assert_allclose(ends[1:], ends[:1].repeat(2, axis=0), rtol=1e-12)


@pytest.mark.parametrize("count", [3, 5])
def test_intervals_over_seeds_cover_95_percent(count):
    draws = np.random.default_rng(5).normal(2.0, 0.1, (TRIALS, count))
    assert covered([over_seeds(list(values)) for values in draws], 2.0) == pytest.approx(0.95, abs=TOLERANCE)


def test_three_resampled_seeds_would_cover_too_little():
    """Why `over_seeds` does not resample."""
    draws = np.random.default_rng(6).normal(2.0, 0.1, (TRIALS, 3))
    ways = np.stack(np.meshgrid(*[range(3)] * 3), -1).reshape(-1, 3)
    ends = np.quantile(draws[:, ways].mean(-1), (0.025, 0.975), axis=-1)
    assert np.mean((ends[0] <= 2.0) & (2.0 <= ends[1])) < 0.8


def test_differences_over_seeds_are_paired_where_seeds_are_the_same():
    random = np.random.default_rng(7)
    order = random.normal(0.0, 1.0, 5)
    reference = {(seed, seed): float(order[seed]) for seed in range(5)}
    values = {(seed, seed): float(order[seed] - 0.5 + random.normal(0.0, 0.05)) for seed in range(5)}
    disjoint_values = {(seed + 5, seed): value for (seed, _), value in values.items()}
    paired, apart = seed_difference(values, reference), seed_difference(disjoint_values, reference)
    assert paired.value == pytest.approx(apart.value)
    assert paired.excludes_zero and not apart.excludes_zero


def test_welch_covers_95_percent():
    random = np.random.default_rng(8)
    hits = []
    for _ in range(TRIALS):
        values = {(0, seed): float(x) for seed, x in enumerate(random.normal(1.0, 0.3, 4))}
        reference = {(1, seed): float(x) for seed, x in enumerate(random.normal(0.0, 0.1, 6))}
        interval = seed_difference(values, reference)
        hits.append(interval.low <= 1.0 <= interval.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=TOLERANCE)


def test_single_draws_have_no_interval():
    (interval,), (between,) = over_items(np.ones((1, 1)), reference=0)
    assert (interval.low, interval.high, between.low) == (None, None, None)
    assert over_seeds([1.5]).low is None and over_seeds([1.5]).value == 1.5
    assert seed_difference({(0, 0): 1.0}, {(1, 1): 3.0}) == seed_difference({(0, 0): 0.0}, {(5, 1): 2.0})
    assert not seed_difference({(0, 0): 1.0}, {(0, 0): 3.0}).excludes_zero


@pytest.mark.parametrize(
    ("scores", "lower", "best", "interior"),
    [
        ({1e-4: 2.0, 1e-3: 1.0, 1e-2: 3.0}, True, 1e-3, True),
        ({1e-4: 2.0, 1e-3: 1.0, 1e-2: 3.0}, False, 1e-2, False),
        ({1e-3: 1.0, 1e-4: 2.0}, True, 1e-3, False),
        ({1e-4: 2.0, 1e-3: 1.0, 1e-2: math.inf}, True, 1e-3, True),
        ({1e-4: 0.2, 1e-3: 0.1, 1e-2: -math.inf}, False, 1e-4, False),
        ({1e-4: 1.0, 1e-3: 1.0, 1e-2: 1.0}, True, 1e-4, False),
        ({1e-3: 1.0}, True, 1e-3, None),
        ({1e-3: math.inf, 1e-2: math.inf}, True, None, False),
    ],
)
def test_the_best_learning_rate_is_interior_or_at_an_end(scores, lower, best, interior):
    answer = sensitivity(scores, lower)
    assert (answer.best, answer.interior) == (best, interior)
    assert answer.rates == tuple(sorted(scores)) and answer.scores == tuple(scores[rate] for rate in answer.rates)


def test_the_pareto_front():
    scores, costs = [1.0, 2.0, 3.0, 1.5, 2.0, math.inf, 0.5], [3.0, 2.0, 1.0, 3.0, 2.0, 0.0, None]
    assert front(scores, costs, lower=True) == [True, True, True, False, True, False, False]
    assert front([-score for score in scores], costs, lower=False) == front(scores, costs, lower=True)
    assert front([1.0, 1.0], [5.0, 4.0], lower=True) == [False, True]
