"""A run of several processes, one per host: which of them writes, how they agree, and how signals spread."""

import os
import signal
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from sborax.adapters.core import SboraxError

_ROOM = 1024
"""Bytes of an error that the first process sends to the others."""


def join(coordinator: str | None, processes: int | None, process: int | None, heartbeat: int) -> None:
    """Join the processes of a run, before anything else asks for devices.

    - coordinator, processes, process: address of the first process as HOST:PORT, how many processes there are, and the
      number of this one. None: as the launcher of the job says.
    - heartbeat: seconds of silence after which a process counts as dead.

    Raises SboraxError if the processes do not find each other.
    """
    advice = "give --coordinator HOST:PORT, --processes N and --process I"
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=heartbeat)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise SboraxError(f"the processes of this run did not find each other ({reason}); {advice}") from error


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def on_first(work: Callable[[], Any]) -> None:
    """Do `work` on the first process, while the others wait.

    Raises on every process the SboraxError that `work` raises.
    """
    if not several():
        work()
        return
    failure = b""
    if is_first():
        try:
            work()
        except SboraxError as error:
            failure = str(error).encode()[:_ROOM] or b"failed"
    room = np.frombuffer(failure.ljust(_ROOM, b"\0"), np.uint8)
    received = bytes(multihost_utils.broadcast_one_to_all(room)).rstrip(b"\0")
    if received:
        raise SboraxError(received.decode(errors="ignore"))


def check_alike(what: str, number: int) -> None:
    """Raise SboraxError unless every process has the same number."""
    if several():
        numbers = multihost_utils.process_allgather(np.int32(number)).tolist()
        if len(set(numbers)) > 1:
            raise SboraxError(
                f"{what}: processes differ ({numbers}); the run directory must be one that all of them see"
            )


def gathered(tree: PyTree) -> PyTree:
    """The whole leaves on the host, gathered one at a time. All processes of a run must call this."""

    def gathered_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(gathered_leaf, tree)


def held(tree: PyTree) -> tuple[int, int]:
    """Bytes of the parts of arrays on this process, where copies count once, and bytes of the whole arrays."""

    def held_bytes(leaf: jax.Array) -> int:
        return sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())

    leaves = jax.tree.leaves(tree)
    return sum(held_bytes(leaf) for leaf in leaves), sum(leaf.nbytes for leaf in leaves)


def asked_to_stop(request: bool, step: int) -> bool:
    """Whether the run ends after this step, because this process or any other of the run was asked to stop.

    JAX makes all processes agree on one step.
    """
    return multihost_utils.reached_preemption_sync_point(step) if several() else request


def pass_on() -> None:
    """Turn Ctrl-C on one of several processes into SIGTERM, of which JAX tells the others."""
    os.kill(os.getpid(), signal.SIGTERM)
