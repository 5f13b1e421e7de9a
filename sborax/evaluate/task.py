"""What a task is: data, a protocol, and scores with their errors."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sborax.adapters.core import SboraxError
from sborax.data.source import find, read
from sborax.evaluate.scorer import Scorer

Record = Mapping[str, Any]
FOLDS = 20
"""Parts that are left out in turn to see how much a score of a whole set varies."""

Item = TypeVar("Item")


class Metric(NamedTuple):
    """A score and its standard error, None for a single item."""

    value: float
    stderr: float | None


class Measured(NamedTuple):
    """The metrics of a task, the first being its score; what became of each item; and what has to be said with it."""

    metrics: dict[str, Metric]
    items: list[dict[str, Any]]
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractTask(abc.ABC):
    """A data set with a protocol. A class that extends it, and has a default for each field, is a task by its name.

    name: what the command line calls it. data, split: as `sborax.data.source.read` takes them.
    about: the protocol and where it is from. full: items that the published set has.
    notes: what must be known to read the score, such as contamination.
    template: the prompt around an instruction (see `Data.template`), None where the protocol leaves no choice.
    """

    name: str
    data: str
    split: str = "test"
    about: str
    full: int | None = None
    notes: tuple[str, ...] = ()
    template: str | None = None

    @abc.abstractmethod
    def measure(self, units: Sequence[Record], scorer: Scorer, seed: int) -> Measured:
        """The scores on these units. Raises SboraxError for records that the protocol cannot read."""

    def check(self) -> None:
        """Raise SboraxError for data that is not at hand, before a model is loaded. What the hub may have is taken."""
        check_there(self.data, self.split)

    def units(self, scorer: Scorer) -> Sequence[Record]:
        """All that is scored, one by one. Raises SboraxError for data that is missing or unreadable."""
        return records(self.data, self.split)


def records(data: str, split: str) -> list[Record]:
    """Every record of a split. Raises SboraxError for data that is missing or unreadable."""
    check_there(data, split)
    return list(read(data, split))


def check_there(data: str, split: str) -> None:
    """Raise SboraxError for data that is not at hand, unless it may be on the hub."""
    if "/" not in data and find(data, split) is None:
        raise SboraxError(f"{data}: not under $SBORAX_DATA; --data TASK=PATH names a file, a directory or a hub id")


def field(record: Record, name: str) -> Any:
    """A column. Raises SboraxError naming the columns there are."""
    if name not in record:
        raise SboraxError(f"there is no column {name!r}; the columns are {', '.join(record)}")
    return record[name]


def mean(values: Sequence[float]) -> Metric:
    """The mean and its standard error s / sqrt(n)."""
    array = np.asarray(values, np.float64)
    error = None if len(array) < 2 else float(array.std(ddof=1) / math.sqrt(len(array)))
    return Metric(float(array.mean()), error)


def of_whole(items: Sequence[Item], score: Callable[[Sequence[Item]], float]) -> Metric:
    """A score that is no mean over items, and its standard error by a jackknife that leaves out `FOLDS` parts in turn.

    sqrt((g - 1) / g * sum_k (score_k - mean)^2) with g parts.
    """
    folds = min(FOLDS, len(items))
    if folds < 2:
        return Metric(score(items), None)
    left = [score([item for i, item in enumerate(items) if i % folds != fold]) for fold in range(folds)]
    return Metric(score(items), float(math.sqrt((folds - 1) * np.var(left))))


def cut_remark(cut: Sequence[int]) -> tuple[str, ...]:
    """What to say where prompts lost tokens to fit the context."""
    lost = [count for count in cut if count]
    if not lost:
        return ()
    return (
        f"{len(lost):,} of {len(cut):,} prompts lost their beginning to fit the context, {max(lost):,} tokens at most",
    )
