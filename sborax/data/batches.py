"""Batches by step number: a pure function of the data, the seed and the step, so that a run resumes anywhere."""

import bisect
import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import cast

import grain
import numpy as np
from jaxtyping import Bool, Int32

from sborax.adapters.core import SboraxError
from sborax.data.options import Data
from sborax.data.samples import Sample

_ROUND = 16
"""Default row lengths are multiples of this many tokens."""

Batch = dict[str, np.ndarray]
"""tokens, targets, segments (int32) and counts (bool), each (accumulate, batch, length); segment 0 is padding."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Samples arranged in rows. A row holds the numbers of its samples, whose inputs stand one after the other."""

    samples: Sequence[Sample]
    rows: tuple[tuple[int, ...], ...]
    buckets: tuple[int, ...]
    """Lengths that a batch may have, ascending."""

    def length(self, row: int) -> int:
        """Inputs in a row: the last token of a sample is only ever a target."""
        return sum(len(self.samples[sample].tokens) - 1 for sample in self.rows[row])


def pack(lengths: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Best-fit rows of at most `capacity` inputs, planned once from the lengths alone."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for sample, length in enumerate(lengths):
        place = bisect.bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(sample)
        bisect.insort(rooms, (room - length, row))
    return tuple(tuple(row) for row in rows)


def arrange(samples: Sequence[Sample], data: Data) -> Rows:
    """One sample a row, or as many as fit with `data.packing`; row lengths from `data.buckets` or in quarters.

    Raises SboraxError if a row is longer than every given bucket.
    """
    lengths = [len(sample.tokens) - 1 for sample in samples]
    rows = pack(lengths, data.max_length) if data.packing else tuple((number,) for number in range(len(samples)))
    longest = max(sum(lengths[sample] for sample in row) for row in rows)
    quarters = {math.ceil(longest * part / 4 / _ROUND) * _ROUND for part in (1, 2, 3, 4)}
    # No default row is longer than the longest sample may be.
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
    """Tokens, targets, which targets count, and segments, padded on the right. A row without a number stays empty."""
    shape = (len(numbers), length)
    tokens, targets, segments = (np.zeros(shape, np.int32) for _ in range(3))
    counts = np.zeros(shape, bool)
    for place, number in enumerate(numbers):
        start = 0
        for segment, index in enumerate(() if number is None else rows.rows[number], start=1):
            sample = rows.samples[index]
            own = slice(start, start + len(sample.tokens) - 1)
            tokens[place, own], targets[place, own] = sample.tokens[:-1], sample.tokens[1:]
            counts[place, own], segments[place, own] = sample.counts[1:], segment
            start = own.stop
    return tokens, targets, counts, segments


@dataclasses.dataclass(frozen=True)
class Batches:
    """The endless sequence of batches of a run, shuffled anew each epoch. `batches[step]` needs no earlier one."""

    rows: Rows
    batch_size: int
    accumulate: int
    order: grain.MapDataset[int]

    def __getitem__(self, step: int) -> Batch:
        return self.part(step, None)

    def part(self, step: int, own: Collection[int] | None) -> Batch:
        """The batch of `step` in which only these rows of every microbatch are filled, those of one host; None: all."""
        return self.of(self._numbers(step), own)

    def of(self, numbers: Sequence[int], own: Collection[int] | None = None) -> Batch:
        """The batch of the rows of these numbers, as many as a step has. own: as of `part`."""
        longest = max(self.rows.length(number) for number in numbers)
        length = next(bucket for bucket in self.rows.buckets if bucket >= longest)
        names = ("tokens", "targets", "counts", "segments")
        mine = [number if own is None or i % self.batch_size in own else None for i, number in enumerate(numbers)]
        arrays = fill(self.rows, mine, length)
        shape = (self.accumulate, self.batch_size, length)
        return {name: array.reshape(shape) for name, array in zip(names, arrays, strict=True)}

    def tokens(self, step: int) -> int:
        """Inputs in the batch of `step`, padding left out."""
        return sum(self.rows.length(number) for number in self._numbers(step))

    def _numbers(self, step: int) -> list[int]:
        size = self.batch_size * self.accumulate
        return [cast(int, self.order[place]) for place in range(step * size, (step + 1) * size)]

    def steps(self, epochs: int | float) -> int:
        """Steps of so many epochs; a last part of a batch is filled from the next epoch."""
        return max(1, math.ceil(epochs * len(self.rows.rows) / (self.batch_size * self.accumulate)))

    def position(self, step: int) -> tuple[int, int]:
        """Epoch and row within it at which `step` begins."""
        return divmod(step * self.batch_size * self.accumulate, len(self.rows.rows))


def shuffled(rows: Rows, batch_size: int, accumulate: int, seed: int) -> Batches:
    """Batches of whole rows in an order that the seed alone decides."""
    order = grain.MapDataset.range(len(rows.rows)).seed(seed).shuffle().repeat()
    return Batches(rows, batch_size, accumulate, order)


def in_order(rows: Rows, batch_size: int) -> list[Batch]:
    """Every row once, unshuffled, for evaluation; the last batch is filled with rows on which nothing counts."""
    batches = []
    for start in range(0, len(rows.rows), batch_size):
        numbers = list(range(start, min(start + batch_size, len(rows.rows))))
        longest = max(rows.length(number) for number in numbers)
        length = next(bucket for bucket in rows.buckets if bucket >= longest)
        names = ("tokens", "targets", "counts", "segments")
        missing = ((0, batch_size - len(numbers)), (0, 0))
        batches.append({n: np.pad(a, missing) for n, a in zip(names, fill(rows, numbers, length), strict=True)})
    return batches
