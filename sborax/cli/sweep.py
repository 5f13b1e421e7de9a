"""`sborax sweep`."""

from collections.abc import Sequence
from pathlib import Path

from sborax.train.experiment import load_experiment
from sborax.train.grid import Sweep, read_grid
from sborax.train.sweep import sweep as train_all


def sweep(source: str, words: Sequence[str], out: str | None, resume: bool, at_once: int | None) -> bool:
    """Whether the sweep came to its end."""
    changes, grid = read_grid(words)
    description = Sweep(load_experiment(source, changes), grid, at_once)
    return train_all(description, out or f"runs/{Path(source).stem}-sweep", resume=resume).finished
