"""The adapter with the lowest held-out loss of a run, in `best/` of its directory."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.layout.hosts import on_first
from sborax.records.adapter import read_adapter
from sborax.records.disk import writing

BEST = "best"


@dataclasses.dataclass
class Best:
    """`offer` takes every adapter whose loss was measured, and keeps the best."""

    place: epath.Path
    data: Any
    """What the losses are of: a loss on other data cannot be compared."""
    loss: float = math.inf
    writes: bool = True
    """Of several processes one moves files; all of them decide, and `write` may need all."""

    def offer(self, step: int, loss: float, write: Callable[..., None]) -> bool:
        """Whether `loss` is the lowest so far; if so `write(directory, **notes)` has written the adapter.

        Raises SboraxError if the disk refuses; the former best stays.
        """
        if not loss < self.loss:
            return False
        new, old = self.place.with_name(f".{BEST}.new"), self.place.with_name(f".{BEST}.old")
        if self.writes:
            with writing(self.place):
                for left in (new, old):
                    if left.exists():
                        left.rmtree()
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


def best_so_far(run: epath.Path, data: Any, echo: Callable[[str], None], writes: bool = True) -> Best:
    """The best of the run directory `run`, which an earlier process may have begun.

    data: the held-out data as it stands in `config.json`. A best that cannot be read is said and replaced.
    """
    place, old = run / BEST, run / f".{BEST}.old"
    if old.exists() and not place.exists():
        # The process was killed between two moves.
        on_first(lambda: old.rename(place))
    if not place.exists():
        return Best(place, data, writes=writes)
    try:
        about = read_adapter(place).about
    except SboraxError as error:
        echo(f"{error}; the best is sought anew")
        return Best(place, data, writes=writes)
    loss, comparable = about.get("eval_loss"), about.get("eval_data") == data
    return Best(place, data, float(loss) if comparable and isinstance(loss, (int, float)) else math.inf, writes)
