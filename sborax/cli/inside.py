"""The watched process of a run on several hosts: runs the command, and exits without waiting for dead peers."""

import os
import sys
import threading
import time

import jax

from sborax.cli.launcher import INSIDE, LOST
from sborax.cli.main import INTERRUPTED, OK, main
from sborax.config.terminal import say

PATIENCE = 60.0
"""Seconds to wait, after a failed step, for JAX's runtime to report which peer is gone."""


def _end_with(pipe: int) -> None:
    """End this process when the other end of the pipe closes, that is, when the watching process is gone."""
    os.read(pipe, 1)
    os._exit(LOST)


def run() -> int:
    """Run the command. Returns its exit code if every process ends; after a failure, exits this process at once."""
    threading.Thread(target=_end_with, args=(int(os.environ[INSIDE]),), daemon=True).start()
    try:
        code = main()
    except jax.errors.JaxRuntimeError as error:
        say(error, file=sys.stderr)
        # A collective has failed. The runtime ends this process as soon as it knows which peer is gone.
        time.sleep(PATIENCE)
        code = LOST
    if code in (OK, INTERRUPTED):
        jax.distributed.shutdown()
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        # Gives the others time to report their own error before they notice that the first process is gone.
        time.sleep(1)
    os._exit(code)


if __name__ == "__main__":
    sys.exit(run())
