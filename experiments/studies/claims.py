"""Claims of papers, and the rule by which results decide them."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from experiments.studies.tuning import Tuned
from sborax.evaluate.compare.statistics import Interval, over_items, over_seeds
from sborax.sweep.rates import higher, lower

Verdict = Literal["reproduced", "not reproduced", "undecided", "not run yet"]
SEEDS = 3
"""The fewest seeds that decide."""
HALF_STEP = 0.25
"""Half of the distance of two learning rates, in decades."""
SLOPE = 0.05
"""Decades of a learning rate for each doubling of a size that count as none."""
EQUAL = 0.005
"""A gain below this share of the reference's loss is none."""
RULE = f"""\
A claim is judged by the difference that it is about, at the learning rate of each arm. There are two 95 % intervals of
it, one over items and one over seeds, both paired.

- **Reproduced**: both intervals lie on the side that the claim says.
- **Not reproduced**: both exclude a gain of {100 * EQUAL:g} % of the reference's loss.
  A claim that an arm is as good as another allows it a loss of some per cent more, and is refuted beyond these.
- **Undecided**: anything else, fewer than {SEEDS} seeds, or a best learning rate that is the first or the last tried.

A claim that a number lies within a band is reproduced if both intervals lie in the band, and not reproduced if both lie
outside. With several settings, a claim is reproduced if it is in all of them, and not reproduced if it is not in one
and reproduced in none."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What results say about a claim in one setting.

    - setting: of the arms that were compared.
    - verdict: by the rule.
    - numbers: the difference in words, with its intervals.
    """

    setting: str
    verdict: Verdict
    numbers: str


Arms = Mapping[str, Tuned | None]
"""The arms of a setting by name; None for one with pending pieces."""


@dataclasses.dataclass(frozen=True)
class AbstractClaim(abc.ABC):
    """A claim: a sentence, and where it is made (an arXiv id, or empty where it is common lore)."""

    sentence: str
    paper: str

    @abc.abstractmethod
    def needs(self, arms: Sequence[str]) -> tuple[str, ...]:
        """The names of the arms that it is about, among those of a setting; empty if the setting has not all."""

    @abc.abstractmethod
    def judge(self, arms: Mapping[str, Tuned]) -> tuple[Verdict, str]:
        """The verdict and its numbers, from the arms that it needs."""

    def find(self, setting: str, arms: Arms) -> Finding | None:
        """What the results of a setting say; None where the setting has no such arms."""
        names = self.needs(tuple(arms))
        if not names:
            return None
        tuned = {name: arm for name in names if (arm := arms[name]) is not None}
        if len(tuned) < len(names):
            return Finding(setting, "not run yet", "")
        if lost := [name for name, arm in tuned.items() if arm.rates.best is None]:
            return Finding(setting, "undecided", f"diverged at every rate: {', '.join(lost)}")
        verdict, numbers = self.judge(tuned)
        ends = [name for name, arm in tuned.items() if not arm.rates.interior]
        count = min(len(arm.seeds) for arm in tuned.values())
        if ends:
            verdict, numbers = "undecided", f"{numbers}; best rate at the end of the tried ones: {', '.join(ends)}"
        if count < SEEDS:
            verdict, numbers = "undecided", f"{numbers}; {count} seeds"
        return Finding(setting, verdict, numbers)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean of paired differences, with its intervals over items and over seeds."""

    items: Interval
    seeds: Interval

    @classmethod
    def of(cls, values: Float[np.ndarray, "seeds items"]) -> "Difference":
        """From the difference of every seed and item. Numbers of a run as a whole have one item."""
        return cls(over_items(values.mean(axis=0)[None])[0][0], over_seeds(list(values.mean(axis=1))))

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """Those that are known."""
        return tuple(interval for interval in (self.items, self.seeds) if interval.low is not None)

    def below(self, bound: float) -> bool:
        """Whether every interval lies below a number."""
        return bool(self.intervals) and all(
            interval.high is not None and interval.high < bound for interval in self.intervals
        )

    def above(self, bound: float) -> bool:
        """Whether every interval lies above a number."""
        return bool(self.intervals) and all(
            interval.low is not None and interval.low > bound for interval in self.intervals
        )

    def __str__(self) -> str:
        ends = [f"{interval.low:+.4f} .. {interval.high:+.4f} over {interval.over}" for interval in self.intervals]
        return f"{self.seeds.value:+.4f} ({', '.join(ends)})" if ends else f"{self.seeds.value:+.4f}"


def paired(left: Tuned, right: Tuned, kind: str = "items") -> Difference:
    """The difference of two arms on the items and seeds that both have.

    Raises ValueError if they were measured on different items.
    """
    if left.digests != right.digests:
        raise ValueError(f"{left.arm.name} and {right.arm.name} were measured on different items")
    return Difference.of(_values(left, right.seeds, kind) - _values(right, left.seeds, kind))


def _values(arm: Tuned, seeds: Sequence[int], kind: str) -> Float[np.ndarray, "seeds items"]:
    values = arm.losses(kind) if kind in ("items", "kept") else arm.numbers(kind)
    return values[[place for place, seed in enumerate(arm.seeds) if seed in seeds]]


def decide(gap: Difference, gain: float, slack: float = 0.0) -> Verdict:
    """Whether a difference lies below `slack`: below 0, and then by a `gain` worth speaking of, or not far above it."""
    if gap.below(slack):
        return "reproduced"
    return "not reproduced" if gap.above(slack or -gain) else "undecided"


def in_band(gap: Difference, low: float, high: float) -> Verdict:
    """Whether a difference lies within a band."""
    if gap.above(low) and gap.below(high):
        return "reproduced"
    return "not reproduced" if gap.below(low) or gap.above(high) else "undecided"


@dataclasses.dataclass(frozen=True)
class Beats(AbstractClaim):
    """The loss of `arm` is lower than that of `other`.

    - slack: a share of the other's loss by which it may be higher: for "as good as".
    - kind: "items" for the loss of the reported items, "kept" for that of the kept text, or a number of the run, such
      as "area" for the mean loss over its steps.
    """

    arm: str
    other: str = "LoRA"
    slack: float = 0.0
    kind: str = "items"

    def needs(self, arms: Sequence[str]) -> tuple[str, ...]:
        names = (self.arm, self.other)
        return names if set(names) <= set(arms) else ()

    def judge(self, arms: Mapping[str, Tuned]) -> tuple[Verdict, str]:
        left, right = arms[self.arm], arms[self.other]
        gap = paired(left, right, self.kind)
        scale = float(_values(right, right.seeds, self.kind).mean())
        return decide(gap, EQUAL * scale, self.slack * scale), f"{gap} of {scale:.4f}"


@dataclasses.dataclass(frozen=True)
class Within(AbstractClaim):
    """The loss of every one of `names` is within a share of the reference's, `other`. One surely outside refutes it."""

    names: tuple[str, ...]
    share: float
    other: str = "LoRA"

    def needs(self, arms: Sequence[str]) -> tuple[str, ...]:
        return (self.other, *self.names) if {self.other, *self.names} <= set(arms) else ()

    def judge(self, arms: Mapping[str, Tuned]) -> tuple[Verdict, str]:
        reference = arms[self.other]
        scale = float(reference.losses().mean())
        gaps = {name: paired(arms[name], reference) for name in self.names}
        bound = self.share * scale
        verdicts = {name: in_band(gap, -bound, bound) for name, gap in gaps.items()}
        outside = [
            f"{name} {100 * gaps[name].seeds.value / scale:+.1f} %" for name in gaps if verdicts[name] != "reproduced"
        ]
        numbers = f"{len(gaps) - len(outside)} of {len(gaps)} within"
        numbers += f"; not surely within: {', '.join(outside)}" if outside else ""
        if not outside:
            return "reproduced", numbers
        return "not reproduced" if "not reproduced" in verdicts.values() else "undecided", numbers


@dataclasses.dataclass(frozen=True)
class RateRatio(AbstractClaim):
    """The best learning rate of `arm` is `ratio` times that of `other`, up to half of the distance of two rates.

    The best rate of a seed is the minimum of a parabola through the three rates around its best. There are no items.
    """

    other: str
    ratio: float
    arm: str = "LoRA"

    def needs(self, arms: Sequence[str]) -> tuple[str, ...]:
        names = (self.arm, self.other)
        return names if set(names) <= set(arms) else ()

    def judge(self, arms: Mapping[str, Tuned]) -> tuple[Verdict, str]:
        left, right = (arms[name].best_by_seed() for name in (self.arm, self.other))
        decades = np.array([[left[seed] - right[seed]] for seed in left if seed in right])
        gap, target = Difference.of(decades), math.log10(self.ratio)
        numbers = f"{10**gap.seeds.value:.2g} times"
        if gap.seeds.low is not None and gap.seeds.high is not None:
            numbers += f" ({10**gap.seeds.low:.2g} .. {10**gap.seeds.high:.2g} over seeds)"
        return in_band(gap, target - HALF_STEP, target + HALF_STEP), numbers


@dataclasses.dataclass(frozen=True)
class RateCosts(AbstractClaim):
    """Half a decade from the best learning rate the loss of `arm` is higher by more than a share of it.

    - above: whether the other rate is the higher one, or the lower.

    The best rate is chosen by other items than those that are compared. A rate at which every seed diverged costs more
    than any share.
    """

    above: bool
    share: float
    arm: str = "LoRA"

    def needs(self, arms: Sequence[str]) -> tuple[str, ...]:
        return (self.arm,) if self.arm in arms else ()

    def judge(self, arms: Mapping[str, Tuned]) -> tuple[Verdict, str]:
        arm = arms[self.arm]
        rate, seeds = neighbour(arm, self.above), common_seeds(arm, self.above)
        if rate not in arm.members:
            return "undecided", f"{rate:g} was not tried"
        if not seeds:
            return "reproduced", f"diverged at {rate:g}"
        gap, scale = rate_cost(arm, self.above), float(arm.losses().mean())
        numbers = f"{gap} at {rate:g}, of {scale:.4f} at {arm.best:g}"
        if len(seeds) < SEEDS:
            return "undecided", f"{numbers}; {len(seeds)} seeds at both"
        bound = self.share * scale
        return "reproduced" if gap.above(bound) else "not reproduced" if gap.below(bound) else "undecided", numbers


def neighbour(arm: Tuned, above: bool) -> float:
    """The learning rate half a decade above the best one of an arm, or below it."""
    return (higher if above else lower)(arm.best)


def common_seeds(arm: Tuned, above: bool) -> list[int]:
    """The seeds that reached the end at the best learning rate and at the one beside it."""
    others = arm.members.get(neighbour(arm, above), {})
    return [seed for seed in arm.at_best if "items" in others.get(seed, {})]


def rate_cost(arm: Tuned, above: bool) -> Difference:
    """The loss of the reported items half a decade from the best learning rate, minus that at the best one."""
    seeds, others = common_seeds(arm, above), arm.members[neighbour(arm, above)]
    best, other = (np.array([members[seed]["items"][1::2] for seed in seeds]) for members in (arm.at_best, others))
    return Difference.of(other - best)


@dataclasses.dataclass(frozen=True)
class LessGrowth(AbstractClaim):
    """The loss of `left[0]` over that of `left[1]` is less than that of `right[0]` over that of `right[1]`."""

    left: tuple[str, str]
    right: tuple[str, str]

    def needs(self, arms: Sequence[str]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys((*self.left, *self.right)))
        return names if set(names) <= set(arms) else ()

    def judge(self, arms: Mapping[str, Tuned]) -> tuple[Verdict, str]:
        if len({arms[name].seeds for name in (*self.left, *self.right)}) > 1:
            return "undecided", "seeds diverged, so nothing is paired"
        (first, second), (other_first, other_second) = (
            [arms[name].losses() for name in names] for names in (self.left, self.right)
        )
        scale = float(other_second.mean())
        grown, other = float((first - second).mean()), float((other_first - other_second).mean())
        gap = Difference.of((first - second) - (other_first - other_second))
        return decide(gap, EQUAL * scale), f"{grown:+.4f} against {other:+.4f}: {gap}"


@dataclasses.dataclass(frozen=True)
class RateSlope(AbstractClaim):
    """The best learning rate does not depend on a size: its slope is within `SLOPE` decades a doubling.

    - sizes: names of arms, each with its size.
    """

    sizes: tuple[tuple[str, int], ...]

    def needs(self, arms: Sequence[str]) -> tuple[str, ...]:
        names = tuple(name for name, _ in self.sizes)
        return names if set(names) <= set(arms) else ()

    def judge(self, arms: Mapping[str, Tuned]) -> tuple[Verdict, str]:
        by_arm = [arms[name].best_by_seed() for name, _ in self.sizes]
        doublings = np.log2([size for _, size in self.sizes])
        slopes = [np.polyfit(doublings, [best[seed] for best in by_arm], 1)[0] for seed in by_arm[0]]
        gap = Difference.of(np.array(slopes)[:, None])
        rates = ", ".join(f"{arms[name].best:g} at {size}" for name, size in self.sizes)
        return in_band(gap, -SLOPE, SLOPE), f"{gap} decades a doubling; {rates}"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict over several settings or arms."""
    if not verdicts or "not run yet" in verdicts:
        return "not run yet"
    if all(verdict == "reproduced" for verdict in verdicts):
        return "reproduced"
    return "not reproduced" if "not reproduced" in verdicts and "reproduced" not in verdicts else "undecided"
