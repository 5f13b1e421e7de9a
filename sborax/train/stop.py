"""How a run responds to SIGTERM and Ctrl-C."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sborax.layout.hosts import pass_on, several


class Stopped(KeyboardInterrupt):
    """Raised at SIGTERM while there is nothing to save."""


class Stop:
    """Stops a run at a signal: at once before its steps begin, and after that as soon as it has saved.

    A second signal goes to the handlers from before the run, which end it at once. Checkpoints that are then being
    written stay incomplete, and are skipped later.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._former: dict[int, Any] = {}

    def listen(self, *numbers: int, act: Callable[[], None]) -> None:
        """Call `act` at these signals. Does nothing outside the main thread, which alone receives signals."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            before = signal.signal(number, lambda *_: act())
            self._former.setdefault(number, before)

    def forget(self) -> None:
        """Restore the handlers that were there before the run."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def in_good_order(self) -> Iterator[threading.Event]:
        """An event that the next signal sets, in this block and after it, until the end of the run."""
        if not several():
            self.listen(signal.SIGTERM, signal.SIGINT, act=self._ask)
        yield self.asked

    def _ask(self) -> None:
        self.asked.set()
        self.forget()

    def refuse(self) -> NoReturn:
        """Raise Stopped."""
        # If the interrupted code swallows the exception, the run ends after its first step.
        self.asked.set()
        raise Stopped("SIGTERM before the first step: nothing is lost, --resume begins where this began")


@contextmanager
def stopping() -> Iterator[Stop]:
    """Handles signals while the block runs. Ctrl-C is left to Python until the steps begin.

    With several processes, JAX itself listens for SIGTERM and tells the others; Ctrl-C is passed on as a SIGTERM.
    """
    stop = Stop()
    if several():
        stop.listen(signal.SIGINT, act=pass_on)
    else:
        stop.listen(signal.SIGTERM, act=stop.refuse)
    try:
        yield stop
    finally:
        stop.forget()
