"""Runs the command of a run on several hosts in a child process, and reports a dead peer in one line.

When a peer has died, JAX's runtime aborts the process before Python can print anything. The parent sees how the child
ended and prints the reason.
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
"""The child's environment variable with its end of a pipe, which closes when the watching process dies."""
LOST = 3
"""Exit code of a run that ended because a peer died."""
HEARTBEAT = 20
"""Seconds of silence after which a peer counts as dead."""
SEVERAL = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Environment variables in which launchers give the number of processes."""
_RUNTIME = re.compile(r"coordination_service|preemption_sync_manager|JAX distributed service|failed to connect to")
_SILENT = re.compile(r"stopped sending heartbeats\):(.*?)The tasks have crashed", re.DOTALL)
_LEADER = re.compile(r"leader|Failed to send RPC to coordination service")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a run of several processes."""
    group = parser.add_argument_group("several hosts", "the same command on each; see docs/pods.md")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join a run of several processes, found as JAX does: TPU pod, SLURM, ...",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
    group.add_argument("--processes", metavar="N", type=int, help="number of processes")
    group.add_argument("--process", metavar="I", type=int, help="number of this process, from 0")
    group.add_argument(
        "--heartbeat", metavar="SECONDS", type=int, default=HEARTBEAT,
        help=f"seconds of silence after which a process counts as dead (default: {HEARTBEAT})",
    )  # fmt: skip


def is_several(arguments: argparse.Namespace) -> bool:
    """Whether this is one of several processes, by the arguments or by a launcher's environment variables."""
    options = (arguments.coordinator, arguments.processes, arguments.process)
    counts = [os.environ.get(name, "1") for name in SEVERAL]
    return (
        arguments.distributed
        or any(option is not None for option in options)
        or "JAX_COORDINATOR_ADDRESS" in os.environ
        or any(count.isdecimal() and int(count) > 1 for count in counts)
    )


def watch(argv: Sequence[str]) -> int:
    """Run the command in a child process and pass signals on.

    Returns the child's exit code; 3, after a line with the reason, if the child or a peer died.
    """
    child_end, parent_end = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "sborax.cli.inside", *argv],
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        pass_fds=(child_end,),
        env={**os.environ, INSIDE: str(child_end)},
    )
    os.close(child_end)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: child.send_signal(received))
    withheld: list[str] = []
    assert child.stderr is not None
    for line in child.stderr:
        if withheld or _RUNTIME.search(line):
            withheld.append(line)
        else:
            print(line, end="", file=sys.stderr, flush=True)
    code = child.wait()
    os.close(parent_end)
    lost = code < 0 or code == LOST
    if not lost or "--debug" in argv:
        print("".join(withheld), end="", file=sys.stderr)
    if lost:
        say(f"error: {ended(code, ''.join(withheld))}", file=sys.stderr)
    return LOST if lost else code


def ended(code: int, output: str) -> str:
    """What ended a child, from its exit code and the runtime's output."""
    further = "the same command with --resume continues from the last checkpoint"
    silent = _SILENT.search(output)
    numbers = re.findall(r"(\d+)\s*$", silent[1], re.MULTILINE) if silent else ["0"] if _LEADER.search(output) else []
    if numbers:
        noun = "process" if len(numbers) == 1 else "processes"
        are = "is" if len(numbers) == 1 else "are"
        return f"{noun} {', '.join(numbers)} of this run {are} gone, its last output may say why; {further}"
    if code < 0 and -code != signal.SIGABRT:
        return f"this process was ended by {signal.Signals(-code).name}; {further}"
    return f"another process of this run is gone, or cannot be reached; {further}"
