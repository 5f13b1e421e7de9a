"""The XLA flag without which sums on a CPU can be wrong.

From version 0.10.2 on, jaxlib computes sums on CPUs with YNNPACK, and fuses some with the product before them. Such a
sum can be wrong from 32,769 rows on (one in `tests/test_xla_flags.py` is off by 0.95 of the largest value). The flag
leaves products to YNNPACK and takes sums away from it. Processes that are started later inherit it.
"""

import importlib
import mmap
import os
import re
import sys
import warnings
from pathlib import Path

import jaxlib
from jaxlib.version import __version__ as JAXLIB

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
RIGHT_SUMS = f"{FLAG}=-reduce"
SWITCH = "SBORAX_XLA_GUARD"
"""The environment variable that turns `guard` off if it is 0."""
AFFECTED = ((0, 10, 2), (0, 12))
"""Versions of jaxlib: the first with wrong sums, and the first that has not been tried."""


def guard() -> None:
    """Put the flag into XLA_FLAGS, or warn if JAX has read these already. A value that the user has set stays.

    XLA ends a process that has an unknown flag, so nothing is done for a jaxlib without this one.
    """
    flags = _flags()
    if os.environ.get(SWITCH) == "0" or FLAG in flags or not affected(JAXLIB) or not _is_known():
        return
    if not has_computed():
        os.environ["XLA_FLAGS"] = f"{flags} {RIGHT_SUMS}".strip()
    elif "cpu" in importlib.import_module("jax.extend.backend").backends():
        warnings.warn(
            f"JAX computed before `import sborax`, so sums on this CPU may be wrong (jaxlib {JAXLIB}); "
            f"import sborax first or set XLA_FLAGS={RIGHT_SUMS} ({SWITCH}=0 silences this)",
            stacklevel=3,
        )


def affected(version: str) -> bool:
    """Whether a jaxlib of this version computes wrong sums."""
    first, fixed = AFFECTED
    return first <= tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < fixed


def has_computed() -> bool:
    """Whether JAX has read XLA_FLAGS. JAX is not imported for this."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def _flags() -> str:
    """The flags that XLA reads: the variable, or the file that it names."""
    value = os.environ.get("XLA_FLAGS", "").strip()
    return value if value.startswith("-") or not Path(value).is_file() else Path(value).read_text().strip()


def _is_known() -> bool:
    """Whether the flag's name is in the largest file of jaxlib, which is XLA."""
    library = max(Path(jaxlib.__file__).parent.iterdir(), key=lambda path: path.stat().st_size)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(FLAG.removeprefix("--").encode()) >= 0
