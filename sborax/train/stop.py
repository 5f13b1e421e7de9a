"""What SIGTERM and Ctrl-C do to a run."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from sborax.layout.hosts import pass_on, several


class Stopped(KeyboardInterrupt):
    """SIGTERM before there was anything to save."""


class Stop:
    """Before its steps begin, a signal ends a run at once. From then on the first one asks it to save and to end.

    A second one is answered by whatever handled signals before the run, which ends it at once: checkpoints that are
    being written then are incomplete and are passed over later.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._former: dict[int, Any] = {}

    def listen(self, *numbers: int, act: Callable[[], None]) -> None:
        """Call `act` at these signals, if this is the main thread, which alone is told of them."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in numbers:
            before = signal.signal(number, lambda *_: act())
            self._former.setdefault(number, before)

    def forget(self) -> None:
        """Handle signals as before the run."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def in_good_order(self) -> Iterator[threading.Event]:
        """An event that the next signal sets. It does so after this block as well, up to the end of the run."""
        if not several():
            self.listen(signal.SIGTERM, signal.SIGINT, act=self._ask)
        yield self.asked

    def _ask(self) -> None:
        self.asked.set()
        self.forget()

    def refuse(self) -> NoReturn:
        """Raise Stopped."""
        # Should whatever was interrupted swallow the exception, the first step is the last.
        self.asked.set()
        raise Stopped("SIGTERM before the first step: nothing is lost, --resume begins where this began")


@contextmanager
def stopping() -> Iterator[Stop]:
    """Signals are the run's business in this block. Ctrl-C is left to Python until the steps begin.

    On several processes JAX itself listens for SIGTERM and tells the others, and Ctrl-C is passed on as one.
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
