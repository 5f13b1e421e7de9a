"""`sborax sweep`."""

from collections.abc import Sequence
from pathlib import Path

from sborax.cli.evaluate import check_tasks, score_run
from sborax.config.terminal import say
from sborax.sweep.grid import Sweep, read_grid
from sborax.sweep.run import sweep as train_all
from sborax.train.experiment import load_experiment


def sweep(
    source: str,
    words: Sequence[str],
    out: str | None,
    resume: bool,
    at_once: int | None,
    imports: Sequence[str] = (),
) -> bool:
    """`sborax sweep`. Returns whether the sweep made all its steps."""
    changes, grid = read_grid(words)
    experiment = load_experiment(source, changes, imports)
    description = Sweep(experiment, grid, at_once)
    # All members have the same tasks.
    check_tasks(experiment)
    place = Path(out or f"runs/{Path(source).stem}-sweep")
    results = train_all(description, place, resume=resume)
    for result in results.members if results.finished and experiment.eval.tasks else ():
        if not result.diverged:
            say(f"{result.name}:")
            score_run(str(place / result.name))
    return results.finished
