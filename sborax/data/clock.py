"""A time limit on what others wrote."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer.

    A signal interrupts it, so there is no limit outside of the main thread, on Windows, and under another alarm.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread() or _alarmed():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _alarmed() -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0
