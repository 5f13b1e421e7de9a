"""Where models and data sets may lie."""

import os
from collections.abc import Iterator
from pathlib import Path


def candidates(name: str, variable: str) -> Iterator[Path]:
    """The paths that `name` may mean: itself, and below each directory that an environment variable lists.

    The directories are separated as in `PATH`.
    """
    yield Path(name).expanduser()
    for home in filter(None, os.environ.get(variable, "").split(os.pathsep)):
        yield Path(home).expanduser() / name
