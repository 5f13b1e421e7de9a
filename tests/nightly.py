"""Parameters of a slow test: some in every run, all of them in the nightly one."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def nightly_unless(kept: Container[Any], values: Iterable[Any]) -> list[Any]:
    """`values` for `pytest.mark.parametrize`, those that are not `kept` marked `nightly`."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.nightly) for value in values]
