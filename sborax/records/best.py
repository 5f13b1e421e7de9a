"""The adapter with the lowest held-out loss of a run, in `best/` of its directory."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.config.documents import is_number
from sborax.layout.hosts import on_first
from sborax.records.adapter import read_adapter
from sborax.records.disk import writing

BEST = "best"


@dataclasses.dataclass
class Best:
    """Keeps the best of all adapters that `offer` is given.

    - place: the directory of the best adapter.
    - data: the held-out data. A loss on other data cannot be compared.
    - loss: the lowest loss so far, in nats per token.
    - writes: whether this process moves files. All processes decide, since writing may need all of them.
    """

    place: epath.Path
    data: Any
    loss: float = math.inf
    writes: bool = True

    def offer(self, step: int, loss: float, write: Callable[..., None]) -> bool:
        """Keep the adapter if `loss` is the lowest so far.

        - write: `write(directory, **notes)` writes the adapter.

        Returns whether it was kept.
        Raises SboraxError if a file cannot be written; the former best stays.
        """
        if not loss < self.loss:
            return False
        new, old = self.place.with_name(f".{BEST}.new"), self.place.with_name(f".{BEST}.old")
        if self.writes:
            with writing(self.place):
                for leftover in (new, old):
                    if leftover.exists():
                        leftover.rmtree()
        write(new, step=step, eval_loss=loss, eval_data=self.data)
        if self.writes:
            with writing(self.place):
                if self.place.exists():
                    self.place.rename(old)
                new.rename(self.place)
                if old.exists():
                    old.rmtree()
        self.loss = loss
        return True


def best_so_far(run: epath.Path, data: Any, done: int, echo: Callable[[str], None], writes: bool = True) -> Best:
    """The best adapter of the run directory `run`, which an earlier process may have begun.

    - data: the held-out data as `config.json` has it.
    - done: the step that the run resumes from. A best adapter of a later step is replaced, since that step is made
      again.
    - echo: told of a best adapter that cannot be read; it will be replaced.
    """
    place, old = run / BEST, run / f".{BEST}.old"
    # A process may have been killed between the two moves of `offer`.
    on_first(lambda: old.rename(place) if old.exists() and not place.exists() else None)
    if not place.exists():
        return Best(place, data, writes=writes)
    try:
        about = read_adapter(place).about
    except SboraxError as error:
        echo(f"{error}; starting without a best adapter")
        return Best(place, data, writes=writes)
    loss, step = about.get("eval_loss"), about.get("step")
    if about.get("eval_data") != data or not is_number(loss) or type(step) is not int or step > done:
        return Best(place, data, writes=writes)
    return Best(place, data, float(loss), writes)
