"""`sborax sweep`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sborax.adapters.core import SboraxError
from sborax.cli.evaluate import check_tasks, score_run
from sborax.config.terminal import say
from sborax.sweep.grid import AUTO, Sweep, read_grid
from sborax.sweep.run import sweep as train_all
from sborax.train.experiment import load_experiment


def sweep(
    source: str,
    words: Sequence[str],
    out: str | None,
    resume: bool,
    at_once: int | None,
    halving: str | None = None,
    imports: Sequence[str] = (),
) -> bool:
    """`sborax sweep`. Returns whether the sweep made all its steps."""
    changes, grid = read_grid(words)
    experiment = load_experiment(source, changes, imports)
    description = Sweep(experiment, grid, at_once, read_rungs(halving))
    # All members have the same tasks.
    check_tasks(experiment)
    place = Path(out or f"runs/{Path(source).stem}-sweep")
    results = train_all(description, place, resume=resume)
    for result in results.members if results.finished and experiment.eval.tasks else ():
        if not (result.diverged or result.stopped):
            say(f"{result.name}:")
            score_run(str(place / result.name))
    return results.finished


def read_rungs(text: str | None) -> tuple[int, ...] | Literal["auto"]:
    """The argument of `--halving`: steps, or "auto"; nothing without it."""
    if text is None or text == AUTO:
        return AUTO if text else ()
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in text.split(",")):
        raise SboraxError(f"--halving {text}: write steps in ascending order, such as 100,200, or auto")
    return tuple(map(int, text.split(",")))
