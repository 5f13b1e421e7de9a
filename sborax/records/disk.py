"""Files of a run, each written whole or not at all, and what to say when the disk refuses."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from sborax.adapters.core import SboraxError

CONFIG = "config.json"
"""The experiment of a run, in its directory."""

_CODE = re.compile(r"os_error_code='(\d+)'")
"""What tensorstore hands on of the operating system's answer."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Answers of the operating system that room would change."""


def refusal(place: epath.PathLike, error: Exception) -> SboraxError:
    """One line for a write that failed."""
    code = _CODE.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
    reason = str(error).strip().partition("\n")[0] if number is None else os.strerror(number)
    remedy = "make room" if number in FULL else "mend that"
    return SboraxError(f"{place}: not written ({reason}); {remedy}, then --resume goes on from the last checkpoint")


@contextmanager
def writing(place: epath.PathLike) -> Iterator[None]:
    """Raises SboraxError, with `place` in it, for an error of the operating system."""
    try:
        yield
    except OSError as error:
        raise refusal(place, error) from error


def replace(path: epath.Path, content: str | bytes) -> None:
    """Write a file in one move: whoever reads it, after a crash too, finds the old content or the new one.

    Raises SboraxError if the disk refuses; the old content stays.
    """
    new = path.with_name(f".{path.name}.new")
    with writing(path):
        try:
            if isinstance(content, str):
                new.write_text(content)
            else:
                new.write_bytes(content)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
