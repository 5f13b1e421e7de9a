"""The user's cache directory: models and data that were fetched, and compiled programs."""

import hashlib
import os
import platform
import re
from pathlib import Path

LARGEST = 4 << 30
"""The most bytes of compiled programs that are kept. Beyond it, the least recently used ones are deleted."""
SHORTEST = 0.05
"""Seconds that a program must take to compile to be kept. A run has dozens that take less than JAX's default of 1 s."""


def cache_dir() -> Path:
    """`sborax` under `$XDG_CACHE_HOME`, by default `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sborax"


def keep_programs() -> None:
    """Have JAX keep compiled programs for the next process, unless the user's variables say where.

    It reads the variables when it is imported. Programs for a CPU may only run on CPUs of its kind, so each kind has a
    directory. A directory that cannot be written is left alone.
    """
    directory = cache_dir() / "programs" / _processor()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(directory, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(LARGEST))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(SHORTEST))


def _processor() -> str:
    """A name of this kind of processor, from the instructions that it has."""
    described = Path("/proc/cpuinfo")
    text = described.read_text() if described.exists() else platform.processor()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return f"{platform.machine()}-{hashlib.sha256((flags[1] if flags else text).encode()).hexdigest()[:8]}"
