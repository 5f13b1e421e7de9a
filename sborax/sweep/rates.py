"""Learning rates: which of those that were tried is the best, and which to try next."""

import dataclasses
import itertools
import math
from collections.abc import Mapping

LR = "optimizer.lr"
"""The key of the learning rate in a config."""
SEEDS = ("seed_data", "seed_adapter")
EXTENSIONS = 6
"""How many rates a sweep adds to those it begins with: three decades."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Scores by learning rate.

    - rates: ascending.
    - scores: mean over seeds at each; infinitely bad where every seed diverged.
    - best: the rate of the best score; None where no score is finite.
    - interior: whether a lower and a higher rate were tried and are worse; None where the question makes no sense,
      because fewer than two rates were tried. False calls for more rates beyond the best.
    """

    rates: tuple[float, ...]
    scores: tuple[float, ...]
    best: float | None
    interior: bool | None


def sensitivity(scores: Mapping[float, float], lower: bool) -> Sensitivity:
    """Order scores by learning rate and say which is best. Of equal scores the lowest rate counts as the best.

    Args:
    - scores: by learning rate. Runs that diverged count as tried: infinity where lower is better, else minus infinity.
    - lower: whether lower scores are better.
    """
    rates = tuple(sorted(scores))
    ordered = tuple(scores[rate] for rate in rates)
    finite = [rate for rate in rates if math.isfinite(scores[rate])]
    if not finite:
        return Sensitivity(rates, ordered, None, None if len(rates) < 2 else False)
    best = (min if lower else max)(finite, key=lambda rate: scores[rate])
    interior = None if len(rates) < 2 else rates[0] < best < rates[-1]
    return Sensitivity(rates, ordered, best, interior)


def extension(tried: Sensitivity) -> float | None:
    """The rate to try next: half a decade beyond the best one, where that is the lowest or the highest.

    None where the best is interior, and where every rate diverged.
    """
    if tried.best is None or tried.interior:
        return None
    return lower(tried.rates[0]) if tried.best == tried.rates[0] else higher(tried.rates[-1])


def midpoints(tried: Sensitivity) -> tuple[float, ...]:
    """The rates halfway, in decades, between the best one and the two beside it, with two digits: 1.7e-3, 5.5e-3.

    Empty where the best is not interior.
    """
    if tried.best is None or not tried.interior:
        return ()
    place = tried.rates.index(tried.best)
    pairs = itertools.pairwise(tried.rates[place - 1 : place + 2])
    return tuple(float(f"{math.sqrt(low * high):.1e}") for low, high in pairs)


def half_decades(low: float, count: int) -> tuple[float, ...]:
    """Learning rates half a decade apart from `low`, a 1 or a 3 with zeros: 1e-3, 3e-3, 1e-2, ..."""
    rates = [low]
    while len(rates) < count:
        rates.append(higher(rates[-1]))
    return tuple(rates)


def higher(rate: float) -> float:
    """The next learning rate: 3e-3 after 1e-3, 1e-2 after 3e-3."""
    digit, exponent = f"{rate:.0e}".split("e")
    return float(f"3e{exponent}") if digit == "1" else float(f"1e{int(exponent) + 1}")


def lower(rate: float) -> float:
    """The learning rate before: 1e-3 before 3e-3, 3e-4 before 1e-3."""
    digit, exponent = f"{rate:.0e}".split("e")
    return float(f"1e{exponent}") if digit == "3" else float(f"3e{int(exponent) - 1}")
