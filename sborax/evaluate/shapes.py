"""Groups requests of mixed lengths into batches of few shapes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

LEAST = 16
"""Tokens of the shortest row."""


class RequestBatch(NamedTuple):
    """The requests of one forward pass, and the shape of its arrays.

    - members: indices of the requests.
    - rows: at least as many as requests.
    - width: tokens of a row.
    - continuation: tokens of a continuation.
    """

    members: tuple[int, ...]
    rows: int
    width: int
    continuation: int


def padded(length: int, limit: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that is at least `length`, but no more than `limit`."""
    width = LEAST
    while width < length:
        width = width * 3 // 2 if width & (width - 1) == 0 else width // 3 * 4
    return max(length, min(width, limit))


def batches(
    lengths: Sequence[tuple[int, int]], limit: int, budget: int, multiple: int = 1, copies: int = 1
) -> Iterator[RequestBatch]:
    """Batches of requests, from the longest to the shortest. Neighbours share a shape; only the last batch is not full.

    - lengths: of each request, tokens of the row and of the continuation.
    - limit: the model's context, in tokens.
    - budget: tokens of one forward pass; a batch has at least one row.
    - multiple: the number of rows is a multiple of this.
    - copies: continuations of each row.
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
        yield RequestBatch(members, rows, width, max(continuation, 1 << (longest - 1).bit_length()))
        start += rows
