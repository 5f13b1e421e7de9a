"""The directory of a run: which process writes there, what it may hold already, and what a failed start leaves."""

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
from sborax.records.checkpoint import FOLDER
from sborax.records.disk import CONFIG
from sborax.records.report import METRICS

LOCK = ".lock"
"""Locked by the process that writes to the directory; its content says which that is."""
START = "start"
"""Adapters whose start depended on more than the weights, as they were then."""
WRITTEN = (CONFIG, METRICS, FOLDER, START, BEST, "profile", "tensorboard", "wandb", "wandb.json")
"""What a run may have written before its first step has ended."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""How file systems say that they have none."""


@contextlib.contextmanager
def claimed(place: epath.Path, resume: bool, form: str = CONFIG, written: tuple[str, ...] = WRITTEN) -> Iterator[None]:
    """The directory, made and held by this process alone. A start that fails takes back what it has written.

    form: the file that tells what the directory is of. written: names of what a start writes.
    Raises SboraxError for a directory that another process holds, or that may not be written to.
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
        raise SboraxError(f"{place}: exists and is not empty; --resume goes on with that run, or choose another --out")
    # A job that a launcher starts again, or one in a bucket, may have ended before it wrote anything.
    if resume and not place.exists() and _is_local(place) and not jax.distributed.is_initialized():
        raise SboraxError(f"{place}: there is no run to resume; leave --resume out to begin one there")
    if resume and _content(place) and not (place / form).exists():
        raise SboraxError(f"{place}: has no {form}, so there is no run to resume; choose another --out")


def _is_local(place: epath.Path) -> bool:
    return "://" not in os.fspath(place)


def _has_steps(place: epath.Path) -> bool:
    """Whether the run, or a member of the sweep, has come through a step: it has told of it."""
    told = [place / METRICS, *(entry / METRICS for entry in place.iterdir() if entry.is_dir())]
    return any(file.exists() and file.stat().length for file in told)


def _remove(place: epath.Path, written: tuple[str, ...]) -> None:
    for name in written:
        entry = place / name
        if entry.is_dir():
            entry.rmtree()
        else:
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(place: epath.Path) -> Iterator[None]:
    """Hold a directory by a lock of the operating system, which ends with the process however that ends.

    Where there are no such locks, as in a bucket, the directory is not held.
    Raises SboraxError, which says who holds it.
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
            # While it is held: a process that has opened this file finds that it is gone, and opens another.
            file.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(file: Path) -> int | None:
    """The open file, None where the file system has no locks."""
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
            raise SboraxError(
                f"{file.parent}: in use by {holder or 'another process'}; wait until it has ended, or end it"
            ) from None
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {since}\n".encode())
    return descriptor
