"""A run of several processes, each on a host of its own: who speaks, how all agree, and what all hear of a signal."""

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
"""Bytes that an error may take."""


def join(coordinator: str | None, processes: int | None, process: int | None, heartbeat: int) -> None:
    """Make this process one of a run's, before anything else asks for devices. None: what the launcher of the job says.

    heartbeat: seconds of silence after which a process counts as dead.
    Raises SboraxError if the others are not found.
    """
    told = "give --coordinator HOST:PORT, --processes N and --process I"
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=heartbeat)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise SboraxError(f"the processes of this run did not find each other ({reason}); {told}") from error


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


def on_first(work: Callable[[], Any]) -> None:
    """Do `work` on the first process alone, the others waiting.

    Raises on every process the SboraxError that it raised.
    """
    if not several():
        work()
        return
    wrong = b""
    if is_first():
        try:
            work()
        except SboraxError as error:
            wrong = str(error).encode()[:_ROOM] or b"failed"
    room = np.frombuffer(wrong.ljust(_ROOM, b"\0"), np.uint8)
    told = bytes(multihost_utils.broadcast_one_to_all(room)).rstrip(b"\0")
    if told:
        raise SboraxError(told.decode(errors="ignore"))


def check_alike(what: str, number: int) -> None:
    """Raise SboraxError unless every process has the same number."""
    if several():
        found = multihost_utils.process_allgather(np.int32(number)).tolist()
        if len(set(found)) > 1:
            raise SboraxError(f"{what}: processes differ ({found}); the run directory must be one that all of them see")


def gathered(tree: PyTree) -> PyTree:
    """The leaves on the host, whole. On several processes all must ask; one leaf is put together at a time."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(one, tree)


def held(tree: PyTree) -> tuple[int, int]:
    """Bytes of the arrays that this process holds, copies on several devices counted once, and of the whole arrays."""

    def one(leaf: jax.Array) -> int:
        return sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())

    leaves = jax.tree.leaves(tree)
    return sum(one(leaf) for leaf in leaves), sum(leaf.nbytes for leaf in leaves)


def asked_to_stop(asked: bool, step: int) -> bool:
    """Whether the run ends after this step, because this process was asked to or, on several, because any was.

    JAX lets all of them agree on one step.
    """
    return multihost_utils.reached_preemption_sync_point(step) if several() else asked


def pass_on() -> None:
    """Ctrl-C on one of several processes: what SIGTERM is, which JAX tells the others of."""
    os.kill(os.getpid(), signal.SIGTERM)
