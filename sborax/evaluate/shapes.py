"""Requests of mixed lengths as batches of few shapes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

LEAST = 16
"""Shortest row, in tokens."""


class Batch(NamedTuple):
    """Which requests go into one forward pass. rows: of the array, at least as many as there are requests."""

    members: tuple[int, ...]
    rows: int
    width: int
    continuation: int


def padded(length: int, limit: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length` tokens, and no more than `limit`."""
    width = LEAST
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 else width // 3 * 4
    return max(length, min(width, limit))


def batches(
    lengths: Sequence[tuple[int, int]], limit: int, budget: int, multiple: int = 1, copies: int = 1
) -> Iterator[Batch]:
    """Requests from the longest to the shortest; rows next to each other share a shape, and only the last is not full.

    lengths: tokens of the row, and of the continuation, of each request. limit: the model's context.
    budget: tokens of one forward pass, a row at least. multiple: of which the number of rows is one.
    copies: continuations that a row has.
    """
    order = sorted(range(len(lengths)), key=lambda i: (*lengths[i], i), reverse=True)
    tails: dict[int, int] = {}
    for length, tail in lengths:
        width = padded(length, limit)
        tails[width] = max(tail, tails.get(width, 1))
    start = 0
    while start < len(order):
        width = padded(lengths[order[start]][0], limit)
        continuation = 1 << (tails[width] - 1).bit_length()
        fitting = max(1, budget // (width + (copies - 1) * continuation))
        rows = -(-(1 << (fitting.bit_length() - 1)) // multiple) * multiple
        members = tuple(order[start : start + rows])
        longest = max(lengths[i][1] for i in members)
        yield Batch(members, rows, width, max(continuation, 1 << (longest - 1).bit_length()))
        start += rows
