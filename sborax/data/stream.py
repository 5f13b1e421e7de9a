"""Prefetches batches in a background thread."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sborax.adapters.core import SboraxError
from sborax.data.batches import Batch

THREADS = 1
"""One thread suffices: making a batch takes a few copies, far less than a step."""
AHEAD = 4
"""The most batches that wait for their step."""


@contextmanager
def stream(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Iterator[Batch]]:
    """The batches of the steps from `start` up to, not including, `stop`.

    - make: a pure function of the step, so the state of the iterator is the number of the next step alone.

    A SboraxError of `make` is raised when its batch is taken.
    """
    import grain

    def batch_or_error(step: int) -> Batch | SboraxError:
        try:
            return make(step)
        # grain would add its own lines to the error.
        except SboraxError as error:
            return error

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    batches = iter(grain.MapDataset.range(start, stop).map(batch_or_error).to_iter_dataset(options))
    try:
        yield map(_raised, batches)
    finally:
        batches.close()


def _raised(batch: Batch | SboraxError) -> Batch:
    """The batch; raises it if it is an error."""
    if isinstance(batch, SboraxError):
        raise batch
    return batch
