"""`sborax sweep`."""

from collections.abc import Sequence
from pathlib import Path

from sborax.cli.evaluate import check_tasks, score_run
from sborax.train.experiment import load_experiment
from sborax.train.grid import Sweep, read_grid
from sborax.train.sweep import sweep as train_all


def sweep(source: str, words: Sequence[str], out: str | None, resume: bool, at_once: int | None) -> bool:
    """Whether the sweep came to its end."""
    changes, grid = read_grid(words)
    description = Sweep(load_experiment(source, changes), grid, at_once)
    for member in description.members():
        check_tasks(member.experiment)
    place = Path(out or f"runs/{Path(source).stem}-sweep")
    results = train_all(description, place, resume=resume)
    for member, result in zip(description.members(), results.members, strict=True):
        if results.finished and not result.diverged and member.experiment.eval.tasks:
            print(f"{member.name}:")
            score_run(str(place / member.name))
    return results.finished
