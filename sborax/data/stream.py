"""Batches made ahead of the step that takes them, by a thread in the background."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grain

from sborax.adapters.core import SboraxError
from sborax.data.batches import Batch

THREADS = 1
"""Making a batch is a few copies: one thread is far ahead of any step."""
AHEAD = 4
"""Batches that wait at most. Each is a few arrays of the size of a batch."""


@contextmanager
def stream(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Iterator[Batch]]:
    """The batches of steps `start` to `stop`, in order; `make` must be a pure function.

    Where a run stands in its data is thus the number of the next step and nothing else.
    Raises a SboraxError of `make` when its batch is asked for.
    """

    def made(step: int) -> Batch | SboraxError:
        try:
            return make(step)
        # grain would add lines of its own to what an error says.
        except SboraxError as error:
            return error

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    found = iter(grain.MapDataset.range(start, stop).map(made).to_iter_dataset(options))
    try:
        yield map(_whole, found)
    finally:
        found.close()


def _whole(batch: Batch | SboraxError) -> Batch:
    if isinstance(batch, SboraxError):
        raise batch
    return batch
