"""Runs cases in a child process, in a folder surrounded by bait, and reports the outcome of each."""

import collections
import dataclasses
import faulthandler
import json
import mmap
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

COMMAND = (sys.executable, "-P", str(Path(__file__).parents[2] / "sborax" / "data" / "sandbox.py"))
"""The command that renders chat templates."""
SECONDS = 5.0
"""Time limit of a case."""
MEMORY = 2 << 30
"""Bytes of address space that a case may add. A larger allocation fails, which counts as a failure of the reader."""
GROWTH = 256 << 20
"""Bytes by which a case may raise the peak memory of the process."""
LONGEST = 2_000
"""Characters of an error."""
RESTARTS = 20
WATCHED = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class")


@dataclasses.dataclass
class Tally:
    """Outcomes of the cases of one reader.

    - done: all cases.
    - fine: cases that were read.
    - lines: how many cases ended in each error.
    - wrong: (number, problem) of the cases that failed.
    """

    done: int = 0
    fine: int = 0
    lines: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    @property
    def refused(self) -> int:
        """Cases that ended in a one-line error."""
        return sum(self.lines.values())


class Guard:
    """Records forbidden events while a case runs: files touched outside of it, processes and connections."""

    def __init__(self, jail: Path) -> None:
        self.inside, self.jail = f"{jail / 'case'}/", f"{jail}/"
        self.cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or self.inside
        self.events: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.events is None:
            return
        if event == "subprocess.Popen" and tuple(arguments[1]) == COMMAND:
            # The renderer is started again if a template did not end.
            return
        if event in FORBIDDEN:
            self.events.append(f"{event} {arguments[:2]}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self._path("writes" if writes else "reads", path)
        elif event in WATCHED:
            for path in arguments[:2]:
                self._path(event, path)

    def _path(self, event: str, path: Any) -> None:
        if not isinstance(path, (str, bytes)):
            return
        full = os.path.abspath(os.fsdecode(path))
        if f"{full}/".startswith(self.inside) or full.startswith((self.cache, "/dev/")):
            return
        if event != "reads" or full.startswith((self.jail, "/etc/passwd")):
            assert self.events is not None
            self.events.append(f"{event} {full}")


def _listing(jail: Path) -> list[tuple[str, int, int]]:
    """(path, size, time of change) of everything in the jail but the case."""
    entries = []
    for folder in (jail, jail / "outside", jail / "cwd"):
        for entry in os.scandir(folder):
            if entry.name != "case":
                status = entry.stat()
                entries.append((entry.path, status.st_size, status.st_mtime_ns if entry.is_file() else 0))
    return sorted(entries)


def furnish(jail: Path) -> None:
    """Make the folders of a jail, with bait for names that lead out of a case."""
    for name in ("case", "outside", "cwd", "home"):
        (jail / name).mkdir(parents=True)
    head = json.dumps({"stolen": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    bait = struct.pack("<Q", len(head)) + head + bytes(4)
    for place in ("outside/model.safetensors", "cwd/model.safetensors", "model.safetensors"):
        (jail / place).write_bytes(bait)
    (jail / "outside" / "tokenizer.9.9.9.json").write_text("{}")


def outcome(call: Callable[[], Any]) -> tuple[bool, str]:
    """`(fine, text)`: whether a call succeeded or raised a legal error, and the error or problem; "" for success."""
    from sborax.adapters.core import SboraxError

    try:
        call()
    except (SboraxError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        line = str(error)
        if isinstance(error, SboraxError) and (len(line) > LONGEST or not line.isprintable()):
            return False, f"an error that is not one short line: {line[:200]!r} ({len(line)} letters)"
        return True, line or type(error).__name__
    except BaseException as error:  # noqa: BLE001  (any other exception is a finding)
        frames = [f"{frame.filename.rpartition('/sborax/')[2]}:{frame.lineno}" for frame in traceback.extract_tb(
            error.__traceback__) if "/sborax/" in frame.filename and "/scripts/" not in frame.filename]  # fmt: skip
        return False, f"{type(error).__name__} at {frames[-1] if frames else '?'}: {str(error)[:160]!r}"
    return True, ""


def cases(
    reader: str,
    seed: int,
    jail: Path,
    numbers: range,
    ready: Callable[[], None] = lambda: None,
    started: Callable[[int], None] = lambda number: None,
) -> Tally:
    """Run cases in this process.

    Args:
    - reader: a name in `READERS`.
    - seed: of all cases.
    - jail: a folder that `furnish` made.
    - numbers: numbers of the cases.
    - ready: called once before the first case.
    - started: called with the number before every case.
    """
    from .readers import READERS

    prepare, case = READERS[reader](jail / "home"), jail / "case"
    guard, tally, before = Guard(jail), Tally(), _listing(jail)
    os.chdir(jail / "cwd")
    ready()
    for number in numbers:
        started(number)
        shutil.rmtree(case)
        case.mkdir()
        call = prepare(Random(f"{reader} {seed} {number}"), case)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        guard.events = events = []
        fine, text = outcome(call)
        guard.events = None
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most)
        if grown > GROWTH and tally.done:
            fine, text = False, f"took {grown >> 20} MiB; {text[:100]}"
        if events:
            fine, text = False, f"outside of the directory: {events[0]}"
        if _listing(jail) != before:
            fine, text = False, f"changed something outside of the directory; {text[:100]}"
            before = _listing(jail)
        tally.done += 1
        if not fine:
            tally.wrong.append((number, text))
        elif text:
            tally.lines[_kind(text)] += 1
        else:
            tally.fine += 1
    return tally


def _kind(line: str) -> str:
    """An error without the parts that differ from case to case."""
    line = re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|[0-9][\w.+-]*", "_", line.replace("\n", " "))
    return line[:90]


def child(reader: str, seed: int, jail: Path, first: int, last: int, limit: float = SECONDS) -> None:
    """Run cases as the child process. The last line on stdout is the tally."""
    with (jail.parent / "number").open("r+b") as file:
        current = mmap.mmap(file.fileno(), 8)

    def ready() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))

    def started(number: int) -> None:
        current[:] = struct.pack("<q", number)
        faulthandler.dump_traceback_later(limit, exit=True)

    tally = cases(reader, seed, jail, range(first, last), ready, started)
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps([tally.done, tally.fine, tally.lines, tally.wrong]))


def fuzz(reader: str, count: int, seed: int, first: int = 0, limit: float = SECONDS) -> Tally:
    """Run `count` cases of a reader. A child that dies counts as a failure of its case, and a new child continues."""
    total = Tally()
    last = first + count
    for _ in range(RESTARTS):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            (Path(scratch) / "number").write_bytes(struct.pack("<q", first))
            jail = Path(scratch) / "jail"
            furnish(jail)
            words = ["--child", str(jail), reader, "--seed", str(seed), "--first", str(first), "--last", str(last)]
            words += ["--seconds", str(limit)]
            done = subprocess.run(
                [sys.executable, str(Path(__file__).parents[1] / "fuzz.py"), *words],
                capture_output=True, text=True, errors="replace", env=_environment(),
            )  # fmt: skip
            (number,) = struct.unpack("<q", (Path(scratch) / "number").read_bytes())
        if done.returncode == 0:
            _add(total, json.loads(done.stdout.strip().splitlines()[-1]))
            return total
        text = "\n".join(done.stderr.strip().splitlines()[-25:])
        hung = "Timeout" in done.stderr
        total.wrong.append((number, f"{'hung' if hung else f'the interpreter ended ({done.returncode})'}: {text}"))
        total.done += number - first + 1
        first = number + 1
        if first >= last:
            break
    return total


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    changes = {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **changes, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "PYTHONWARNINGS": "ignore"}


def _add(total: Tally, tally: list[Any]) -> None:
    """Add the tally that a child printed."""
    done, fine, lines, wrong = tally
    total.done += done
    total.fine += fine
    total.lines.update(lines)
    total.wrong += map(tuple, wrong)
