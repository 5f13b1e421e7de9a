"""Parameters of a slow test: some in every run, all of them in the nightly one."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def nightly_unless(subset: Container[Any], values: Iterable[Any]) -> list[Any]:
    """`values` for `pytest.mark.parametrize`, those that are not in `subset` marked `nightly`."""
    return [value if value in subset else pytest.param(value, marks=pytest.mark.nightly) for value in values]
