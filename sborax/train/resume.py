"""Checks that a resumed run has the config it had before."""

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.config.codec import encode
from sborax.records.checkpoint import CHECKPOINTS
from sborax.records.claim import START
from sborax.records.disk import CONFIG
from sborax.train.experiment import Experiment, load_experiment

MAY_CHANGE = ("steps", "epochs", "save", "eval", "log", "mesh", "attention")
"""Fields that a resumed run may change: they do not affect what the steps so far have computed."""


def check_config(run: epath.Path, experiment: Experiment, computed: bool) -> None:
    """Raise SboraxError if the run to resume differs from `experiment` in a field that may not change.

    Args:
    - computed: whether anything of the run is kept that was computed; if not, every field may change.
    """
    if not computed or not (run / CONFIG).exists():
        return
    old, new = encode(load_experiment(str(run / CONFIG))), encode(experiment)
    # A procedure acts at steps that depend on the length of the run.
    may = MAY_CHANGE if experiment.procedure is None else MAY_CHANGE[2:]
    # The file of a class may have moved.
    changed = [name for name in new if old[name] != new[name] and name not in (*may, "imports")]
    if changed:
        raise SboraxError(
            f"{run}: {changed[0]} differs from the run to resume; only {', '.join(may)} may change, "
            "start another run for anything else"
        )


def check_steps(place: epath.Path, done: int, steps: int) -> None:
    """Raise SboraxError if a run or a sweep has made more steps than it is to make."""
    if done > steps:
        raise SboraxError(f"{place}: has made {done:,} steps, and is to make {steps:,}; give it {done:,} or more")


def has_computed(place: epath.Path) -> bool:
    """Whether a run directory has checkpoints, or adapters that started from data."""
    folders = (place / CHECKPOINTS, place / START)
    return any(folder.exists() and any(folder.iterdir()) for folder in folders)
