"""Atomic writes of a run's files, and one-line errors for failed writes."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from sborax.adapters.core import SboraxError

CONFIG = "config.json"
"""The file of a run directory that holds its experiment."""

SOURCES = "sources.json"
"""The file of a run directory with digests of its base and its data."""

ADAPTER = "adapter"
"""The folder of a run directory with the adapter after the last step."""

SCORE_FOLDER = "scores"
"""The folder of a run directory with the scores of its last adapter."""

_CODE = re.compile(r"os_error_code='(\d+)'")
"""How tensorstore's messages quote the operating system's error number."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of the operating system that more disk space would fix."""


def refusal(place: epath.PathLike, error: Exception) -> SboraxError:
    """The error for a failed write, in one line."""
    code = _CODE.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
    reason = str(error).strip().partition("\n")[0] if number is None else os.strerror(number)
    remedy = "make room" if number in FULL else "fix that"
    return SboraxError(f"{place}: not written ({reason}); {remedy}, then --resume continues from the last checkpoint")


@contextmanager
def writing(place: epath.PathLike) -> Iterator[None]:
    """Turn an OSError of the block into a SboraxError that names `place`."""
    try:
        yield
    except OSError as error:
        raise refusal(place, error) from error


def replace(path: epath.Path, content: str | bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new one, even after a crash.

    A local file that has this content already is left alone.
    Raises SboraxError if it cannot be written; the old content stays.
    """
    data = content.encode() if isinstance(content, str) else content
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        if os.path.isfile(path) and os.path.getsize(path) == len(data) and path.read_bytes() == data:
            return
        try:
            new.write_bytes(data)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
