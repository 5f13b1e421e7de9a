"""Parameters of a slow test: some in every run, all of them in the nightly one."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def nightly_unless(keep: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """`values` for `pytest.mark.parametrize`, those that are not kept marked `nightly`."""
    return [value if keep(value) else pytest.param(value, marks=pytest.mark.nightly) for value in values]
