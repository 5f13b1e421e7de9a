"""Claims a run directory: one process writes to it, resuming needs a run, and a failed start leaves nothing behind."""

import contextlib
import errno
import importlib.util
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from sborax.adapters.core import SboraxError
from sborax.records.best import BEST
from sborax.records.checkpoint import CHECKPOINTS
from sborax.records.disk import CONFIG, SOURCES
from sborax.records.report import METRICS
from sborax.records.trace import PROFILE

LOCK = ".lock"
"""A file that the writing process locks; its content names that process."""
START = "start"
"""The first state of adapters whose initialisation depends on data, such as LoRA-GA's."""
WRITTEN = (CONFIG, SOURCES, METRICS, CHECKPOINTS, START, BEST, PROFILE, "tensorboard", "wandb", "wandb.json")
"""What a run may have written before the end of its first step."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Errors of file systems without locks."""


@contextlib.contextmanager
def claimed(place: epath.Path, resume: bool, form: str = CONFIG, written: tuple[str, ...] = WRITTEN) -> Iterator[None]:
    """Make and lock a directory. If the block fails before the first step of a new run, its files are removed.

    - place: the directory of a run or of a sweep.
    - resume: whether to go on with what is there; else it must be empty.
    - form: the file that a run (`config.json`) or a sweep (`sweep.json`) always has.
    - written: names of what may be written before the first step.

    Raises SboraxError for a directory that another process holds or that cannot be written to, for one that is not
    empty, and, to resume, for one without `form`.
    """
    _check_place(place, resume, form)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SboraxError(f"{place}: cannot write the run ({error})") from error
    with locked(place):
        _check_place(place, resume, form)
        fresh = not _content(place)
        try:
            yield
        except BaseException:
            if fresh and not _has_steps(place):
                with contextlib.suppress(OSError):
                    _remove(place, written)
            raise


def _content(place: epath.Path) -> list[str]:
    return [entry.name for entry in place.iterdir() if entry.name != LOCK] if place.exists() else []


def _check_place(place: epath.Path, resume: bool, form: str) -> None:
    if place.exists() and not place.is_dir():
        raise SboraxError(f"{place}: is a file; choose another run directory")
    if not resume and _content(place):
        raise SboraxError(f"{place}: exists and is not empty; --resume continues that run, or choose another --out")
    # A launcher may restart a job that ended before it wrote anything, and a bucket has no empty directories.
    if resume and not place.exists() and _is_local(place) and not jax.distributed.is_initialized():
        raise SboraxError(f"{place}: there is no run to resume; leave --resume out to begin one there")
    if resume and _content(place) and not (place / form).exists():
        raise SboraxError(f"{place}: has no {form}, so there is no run to resume; choose another --out")


def _is_local(place: epath.Path) -> bool:
    return "://" not in os.fspath(place)


def _has_steps(place: epath.Path) -> bool:
    """Whether the run, or a member of the sweep, has recorded a step."""
    metrics = [place / METRICS, *(entry / METRICS for entry in place.iterdir() if entry.is_dir())]
    return any(file.exists() and file.stat().length for file in metrics)


def _remove(place: epath.Path, names: tuple[str, ...]) -> None:
    for name in names:
        entry = place / name
        if entry.is_dir():
            entry.rmtree()
        else:
            entry.unlink(missing_ok=True)


class InUse(SboraxError):
    """Another process holds the lock of a directory."""


@contextlib.contextmanager
def locked(place: epath.Path) -> Iterator[None]:
    """Lock a directory. The operating system releases the lock when the process ends, however it ends.

    Where there are no locks, as in a bucket, this does nothing.
    Raises InUse, naming the process that holds the lock.
    """
    if not _is_local(place) or importlib.util.find_spec("fcntl") is None:
        yield
        return
    file = Path(place) / LOCK
    descriptor = _lock(file)
    try:
        yield
    finally:
        if descriptor is not None:
            # Removed while locked: a process that waits for this file sees that it is gone, and opens a new one.
            file.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(file: Path) -> int | None:
    """Open and lock the file; the descriptor, or None where the file system has no locks."""
    import fcntl

    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise SboraxError(f"{file.parent}: cannot write the run ({error})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                return None
            raise InUse(
                f"{file.parent}: in use by {holder or 'another process'}; wait until it has ended, or end it"
            ) from None
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {since}\n".encode())
    return descriptor
