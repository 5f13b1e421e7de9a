"""A process of a run on several hosts, and the one that watches it: a dead peer becomes one line.

JAX ends a process from below when a peer has died, before Python can speak. So the command runs in a child, and the
process that was started reads how it ended.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence

from sborax.config.terminal import say

INSIDE = "SBORAX_WATCHED_BY"
"""In the child's environment: the end of a pipe that closes when the watching process dies."""
LOST = 3
"""Exit code of a run that a peer's death has ended."""
HEARTBEAT = 20
"""Seconds of silence after which a peer counts as dead."""
SEVERAL = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Where launchers say how many processes they have started."""
_RUNTIME = re.compile(r"coordination_service|preemption_sync_manager|JAX distributed service|failed to connect to")
_SILENT = re.compile(r"stopped sending heartbeats\):(.*?)The tasks have crashed", re.DOTALL)
_LEADER = re.compile(r"leader|Failed to send RPC to coordination service")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a run of several processes."""
    own = parser.add_argument_group("several hosts", "the same command on each; docs/pods.md tells the rest")
    own.add_argument(
        "--distributed", action="store_true", help="one of several processes, found as JAX does: TPU pod, SLURM, ..."
    )
    own.add_argument("--coordinator", metavar="HOST:PORT", help="where the first process listens")
    own.add_argument("--processes", metavar="N", type=int, help="how many there are")
    own.add_argument("--process", metavar="I", type=int, help="the number of this one, from 0")
    own.add_argument(
        "--heartbeat", metavar="SECONDS", type=int, default=HEARTBEAT,
        help=f"silence after which a process counts as dead (default: {HEARTBEAT})",
    )  # fmt: skip


def is_several(arguments: argparse.Namespace) -> bool:
    """Whether this is one of several processes, by the arguments or by what a launcher has left in the environment."""
    told = (arguments.coordinator, arguments.processes, arguments.process)
    counts = [os.environ.get(name, "1") for name in SEVERAL]
    return (
        arguments.distributed
        or any(one is not None for one in told)
        or "JAX_COORDINATOR_ADDRESS" in os.environ
        or any(count.isdecimal() and int(count) > 1 for count in counts)
    )


def watch(argv: Sequence[str]) -> int:
    """Run the command in a child and pass signals on: its exit code, or 3 and a line on what has ended it."""
    theirs, ours = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "sborax.cli.inside", *argv],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        pass_fds=(theirs,),
        env={**os.environ, INSIDE: str(theirs)},
    )
    os.close(theirs)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: child.send_signal(got))
    held: list[str] = []
    assert child.stderr is not None
    for line in child.stderr:
        if held or _RUNTIME.search(line):
            held.append(line)
        else:
            print(line, end="", file=sys.stderr, flush=True)
    code = child.wait()
    os.close(ours)
    lost = code < 0 or code == LOST
    if not lost or "--debug" in argv:
        print("".join(held), end="", file=sys.stderr)
    if lost:
        say(f"error: {ended(code, ''.join(held))}", file=sys.stderr)
    return LOST if lost else code


def ended(code: int, told: str) -> str:
    """What ended a child, from its exit code and what the runtime said."""
    further = "the same command with --resume goes on from the last checkpoint"
    silent = _SILENT.search(told)
    gone = re.findall(r"(\d+)\s*$", silent[1], re.MULTILINE) if silent else ["0"] if _LEADER.search(told) else []
    if gone:
        what = "process" if len(gone) == 1 else "processes"
        are = "is" if len(gone) == 1 else "are"
        return f"{what} {', '.join(gone)} of this run {are} gone, what it said last may tell why; {further}"
    if code < 0 and -code != signal.SIGABRT:
        return f"this process was ended by {signal.Signals(-code).name}; {further}"
    return f"another process of this run is gone, or cannot be reached; {further}"
