"""Tasks: data with a protocol that scores a model, and scores with standard errors."""

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
"""Parts that `jackknife` leaves out in turn."""

Item = TypeVar("Item")


class Metric(NamedTuple):
    """A score and its standard error; None for a single item."""

    value: float
    stderr: float | None


class Measured(NamedTuple):
    """The result of a task.

    - metrics: by name; the first is the task's score.
    - items: what the model made of each item, as JSON.
    - remarks: what one must know to interpret the score.
    """

    metrics: dict[str, Metric]
    items: list[dict[str, Any]]
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractTask(abc.ABC):
    """A data set with a protocol. A class of yours with a default for each field is a task that commands find by name.

    - name: its name on the command line.
    - data, split: as `sborax.data.source.read` takes them.
    - about: the protocol and its source.
    - full: items of the published data set; None if not known.
    - notes: what one must know to interpret the score, such as contamination.
    - template: the prompt around an instruction (see `Data.template`); None where the protocol fixes it.
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
        """Score the model on some units.

        - units: of those that `units` returns.
        - seed: of anything that is drawn.

        Raises SboraxError for records that the protocol cannot read.
        """

    def check(self) -> None:
        """Raise SboraxError for data that is not found, before a model is loaded. The hub is not asked."""
        check_there(self.data, self.split)

    def units(self, scorer: Scorer) -> Sequence[Record]:
        """The units to score. Raises SboraxError for data that is missing or unreadable."""
        return records(self.data, self.split)


def records(data: str, split: str) -> list[Record]:
    """Every record of a split. Raises SboraxError for data that is missing or unreadable."""
    check_there(data, split)
    return list(read(data, split))


def check_there(data: str, split: str) -> None:
    """Raise SboraxError for data that is not found, unless its name may be one on the hub."""
    if "/" not in data and find(data, split) is None:
        raise SboraxError(f"{data}: not under $SBORAX_DATA; --data TASK=PATH names a file, a directory or a hub id")


def field(record: Record, name: str) -> Any:
    """The value of a column. Raises SboraxError if it is missing."""
    if name not in record:
        raise SboraxError(f"there is no column {name!r}; the columns are {', '.join(record)}")
    return record[name]


def mean(values: Sequence[float]) -> Metric:
    """The mean and its standard error s / sqrt(n)."""
    array = np.asarray(values, np.float64)
    error = None if len(array) < 2 else float(array.std(ddof=1) / math.sqrt(len(array)))
    return Metric(float(array.mean()), error)


def jackknife(items: Sequence[Item], score: Callable[[Sequence[Item]], float]) -> Metric:
    """A score of a whole set, such as BLEU, with its standard error by a jackknife over g = `FOLDS` parts.

    sqrt((g - 1) / g * sum_k (score_k - mean)^2), where score_k leaves out part k.
    """
    folds = min(FOLDS, len(items))
    if folds < 2:
        return Metric(score(items), None)
    scores = [score([item for i, item in enumerate(items) if i % folds != fold]) for fold in range(folds)]
    return Metric(score(items), float(math.sqrt((folds - 1) * np.var(scores))))


def cut_remark(cut: Sequence[int]) -> tuple[str, ...]:
    """A remark if prompts lost tokens to fit the context.

    - cut: tokens that each prompt lost.
    """
    lost = [count for count in cut if count]
    if not lost:
        return ()
    return (
        f"{len(lost):,} of {len(cut):,} prompts lost their beginning to fit the context, {max(lost):,} tokens at most",
    )
