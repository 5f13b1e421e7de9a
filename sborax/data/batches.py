"""Batches by step number: a pure function of the data, the seed and the step, so a run can resume at any step."""

import bisect
import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from jaxtyping import Bool, Int32

from sborax.adapters.core import SboraxError
from sborax.data.options import Data
from sborax.data.samples import Sample

if TYPE_CHECKING:
    import grain

_ROUND = 16
"""Default row lengths are multiples of this, in tokens."""

Batch = dict[str, np.ndarray]
"""Arrays of shape (accumulate, batch, length): tokens, targets and segments (int32), and counts (bool).

counts says which targets enter the loss. segments numbers the samples of a row from 1; 0 is padding.
"""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Samples arranged in rows.

    - samples: all of them.
    - rows: the indices of each row's samples, in order.
    - buckets: the lengths that a batch may have, ascending.
    """

    samples: Sequence[Sample]
    rows: tuple[tuple[int, ...], ...]
    buckets: tuple[int, ...]

    def length(self, row: int) -> int:
        """The number of inputs in a row. The last token of a sample is a target only."""
        return sum(len(self.samples[sample].tokens) - 1 for sample in self.rows[row])


def pack(lengths: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Pack samples into rows of at most `capacity` inputs, by best fit in the order of the data.

    - lengths: inputs of each sample.

    Returns the indices of each row's samples.
    """
    rows: list[list[int]] = []
    # Room and index of every row, ascending by room.
    rooms: list[tuple[int, int]] = []
    for sample, length in enumerate(lengths):
        fullest = bisect.bisect_left(rooms, (length, -1))
        if fullest < len(rooms):
            room, row = rooms.pop(fullest)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        bisect.insort(rooms, (room - length, row))
    return tuple(tuple(row) for row in rows)


def arrange(samples: Sequence[Sample], data: Data) -> Rows:
    """Arrange samples in rows: one each, or as many as fit with `data.packing`.

    Row lengths are `data.buckets`, by default quarters of the longest row.
    Raises SboraxError if a row is longer than the largest bucket.
    """
    lengths = [len(sample.tokens) - 1 for sample in samples]
    rows = pack(lengths, data.max_length) if data.packing else tuple((number,) for number in range(len(samples)))
    longest = max(sum(lengths[sample] for sample in row) for row in rows)
    quarters = {math.ceil(longest * part / 4 / _ROUND) * _ROUND for part in (1, 2, 3, 4)}
    # A default bucket is never longer than the longest sample allowed.
    buckets = tuple(sorted(data.buckets)) or tuple(sorted({min(length, data.max_length) for length in quarters}))
    if longest > buckets[-1]:
        raise SboraxError(f"data.buckets: the longest row has {longest} tokens, the largest bucket only {buckets[-1]}")
    return Rows(samples, rows, buckets)


def fill(
    rows: Rows, numbers: Sequence[int | None], length: int
) -> tuple[
    Int32[np.ndarray, "batch length"],
    Int32[np.ndarray, "batch length"],
    Bool[np.ndarray, "batch length"],
    Int32[np.ndarray, "batch length"],
]:
    """Arrays of some rows, padded on the right.

    - numbers: indices of rows; None for an empty row.
    - length: of the arrays.

    Returns tokens, targets, which targets count, and segments.
    """
    shape = (len(numbers), length)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    counts = np.zeros(shape, bool)
    for place, number in enumerate(numbers):
        start = 0
        for segment, index in enumerate(() if number is None else rows.rows[number], start=1):
            sample = rows.samples[index]
            span = slice(start, start + len(sample.tokens) - 1)
            tokens[place, span], targets[place, span] = sample.tokens[:-1], sample.tokens[1:]
            counts[place, span], segments[place, span] = sample.counts[1:], segment
            start = span.stop
    return tokens, targets, counts, segments


@dataclasses.dataclass(frozen=True)
class Batches:
    """The endless sequence of batches of a run, shuffled anew each epoch. `batches[step]` depends on no earlier one.

    - rows: the data.
    - batch_size: rows of a microbatch.
    - accumulate: microbatches of a step.
    - order: indices of rows, endless.
    """

    rows: Rows
    batch_size: int
    accumulate: int
    order: "grain.MapDataset[int]"

    def __getitem__(self, step: int) -> Batch:
        return self.part(step, None)

    def part(self, step: int, filled: Collection[int] | None) -> Batch:
        """One host's part of the batch of `step`.

        - filled: the rows of each microbatch that the host holds; others stay empty. None for all.
        """
        return self.of(self._numbers(step), filled)

    def of(self, numbers: Sequence[int], filled: Collection[int] | None = None) -> Batch:
        """The batch of the rows with these indices, as many as a step has; `filled` as in `part`."""
        longest = max(self.rows.length(number) for number in numbers)
        length = next(bucket for bucket in self.rows.buckets if bucket >= longest)
        names = ("tokens", "targets", "counts", "segments")
        present = [
            number if filled is None or i % self.batch_size in filled else None for i, number in enumerate(numbers)
        ]
        arrays = fill(self.rows, present, length)
        shape = (self.accumulate, self.batch_size, length)
        return {name: array.reshape(shape) for name, array in zip(names, arrays, strict=True)}

    def tokens(self, step: int) -> int:
        """The number of inputs in the batch of `step`, without padding."""
        return sum(self.rows.length(number) for number in self._numbers(step))

    def _numbers(self, step: int) -> list[int]:
        size = self.batch_size * self.accumulate
        return [cast(int, self.order[place]) for place in range(step * size, (step + 1) * size)]

    def steps(self, epochs: int | float) -> int:
        """The number of steps of so many epochs. The last batch is filled up from the next epoch."""
        return max(1, math.ceil(epochs * len(self.rows.rows) / (self.batch_size * self.accumulate)))

    def position(self, step: int) -> tuple[int, int]:
        """The epoch, and the row within it, at which `step` begins."""
        return divmod(step * self.batch_size * self.accumulate, len(self.rows.rows))


def shuffled(rows: Rows, batch_size: int, accumulate: int, seed: int) -> Batches:
    """Batches in an order that depends on the seed alone."""
    # It takes seconds to import, which a plan of a run does not need.
    import grain

    order = grain.MapDataset.range(len(rows.rows)).seed(seed).shuffle().repeat()
    return Batches(rows, batch_size, accumulate, order)


def in_order(rows: Rows, batch_size: int) -> list[Batch]:
    """Batches for evaluation: every row once, in order. The last batch is filled up with empty rows."""
    batches = []
    for start in range(0, len(rows.rows), batch_size):
        numbers = list(range(start, min(start + batch_size, len(rows.rows))))
        longest = max(rows.length(number) for number in numbers)
        length = next(bucket for bucket in rows.buckets if bucket >= longest)
        names = ("tokens", "targets", "counts", "segments")
        missing = ((0, batch_size - len(numbers)), (0, 0))
        batches.append({n: np.pad(a, missing) for n, a in zip(names, fill(rows, numbers, length), strict=True)})
    return batches
