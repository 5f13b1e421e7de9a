"""What a watched process runs: the command, and an end that waits for no peer which may be gone."""

import os
import sys
import threading
import time

import jax

from sborax.cli.launcher import INSIDE, LOST
from sborax.cli.main import INTERRUPTED, OK, main
from sborax.config.terminal import say

PATIENCE = 60.0
"""Seconds that the runtime has to say which peer is gone, once a step has failed."""


def _end_with(pipe: int) -> None:
    """End this process when the other end of the pipe closes: nobody watches it any more."""
    os.read(pipe, 1)
    os._exit(LOST)


def run() -> int:
    """The exit code, where every process comes to its end; else this one leaves at once."""
    threading.Thread(target=_end_with, args=(int(os.environ[INSIDE]),), daemon=True).start()
    try:
        code = main()
    except jax.errors.JaxRuntimeError as error:
        say(error, file=sys.stderr)
        # A collective has failed. The runtime ends this process as soon as it knows who is gone.
        time.sleep(PATIENCE)
        code = LOST
    if code in (OK, INTERRUPTED):
        jax.distributed.shutdown()
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        # The others see that the first is gone sooner than what they have to say themselves.
        time.sleep(1)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run())
