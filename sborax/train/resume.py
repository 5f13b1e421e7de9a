"""Checks that a resumed run has the config, base and data it had before, and sets aside files that no longer fit it."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int

from sborax.adapters.core import SboraxError
from sborax.config.codec import encode
from sborax.config.documents import read_object
from sborax.data.batches import Batches, Rows
from sborax.data.samples import Sample
from sborax.records.best import BEST
from sborax.records.checkpoint import CHECKPOINTS
from sborax.records.claim import START
from sborax.records.disk import ADAPTER, CONFIG, SCORE_FOLDER, SOURCES, replace, writing
from sborax.records.lengths import read_lengths, write_lengths
from sborax.records.report import Summary
from sborax.train.experiment import Experiment, load_experiment
from sborax.train.optimizer import schedule
from sborax.train.read import Echo, length_of

MAY_CHANGE = ("steps", "epochs", "save", "eval", "log", "mesh", "attention")
"""Fields that a resumed run may change. Those that affect the steps so far do so by their learning rates alone, and
`record_lengths` records that."""


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


def check_sources(
    run: epath.Path,
    experiment: Experiment,
    prints: Mapping[str, str],
    rows: Rows,
    held_out: Rows,
    computed: bool,
) -> None:
    """Record the base and the data of a run or a sweep; of one that is resumed, check that they are the recorded ones.

    Args:
    - prints: `fingerprint` of the base.
    - rows: of the training data.
    - held_out: of `eval.data`. A resumed run may name other held-out data.
    - computed: whether anything of the run is kept that was computed; if not, all may change.

    Raises SboraxError for another base or other samples. Runs of earlier versions have no record, and get one.
    """
    place, name = run / SOURCES, "held-out data"
    described = {"name": encode(experiment)["eval"]["data"], "digest": _digest(held_out.samples)}
    new: dict[str, Any] = {"base": dict(prints), "data": _digest(rows.samples), name: described}
    if computed and place.exists():
        old = {name: described, **read_object(place)}
        renamed = isinstance(old[name], dict) and old[name].get("name") != described["name"]
        for part in ("base", "data") if renamed else new:
            if old.get(part) != new[part]:
                raise SboraxError(
                    f"{run}: the {part} of the run has changed since it began, though its name is the same; bring back "
                    "what was there, or start another run"
                )
    replace(place, json.dumps(new, indent=2) + "\n")


def _digest(samples: Sequence[Sample]) -> str:
    """Sixteen digits for samples in their order: their tokens, and which of them count."""
    state = hashlib.sha256()
    for sample in samples:
        state.update(len(sample.tokens).to_bytes(8, "little") + sample.tokens.tobytes() + sample.counts.tobytes())
    return state.hexdigest()[:16]


def check_held_out(run: epath.Path, experiment: Experiment, remedy: str) -> None:
    """Raise SboraxError if the losses of a run are of other held-out data than that of `experiment`.

    Args:
    - remedy: what to do instead, for the message.
    """
    old, new = (encode(config)["eval"]["data"] for config in (load_experiment(str(run / CONFIG)), experiment))
    if old != new:
        raise SboraxError(f"{run}: eval.data differs from the data of its recorded losses; {remedy}")


def set_scores_aside(run: epath.Path, steps: int, echo: Echo) -> None:
    """Rename the scores in a run directory, unless the run had ended after `steps` steps before.

    They are of the adapter that is about to be replaced. Raises SboraxError if they cannot be renamed.
    """
    summary = Summary.read(run)
    if not (summary is not None and summary.finished and summary.steps == steps):
        rename_scores(run, "these scores are of an earlier adapter", echo)


def rename_scores(run: epath.Path, reason: str, echo: Echo) -> None:
    """Rename the scores in a run directory, if there are any, to a name that is free, and print why.

    Raises SboraxError if they cannot be renamed.
    """
    place = run / SCORE_FOLDER
    if place.exists():
        names = (run / f"earlier-{SCORE_FOLDER}-{number}" for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        with writing(place):
            place.rename(aside)
        echo(f"{place}: renamed to {aside.name}, since {reason}")


def check_steps(place: epath.Path, done: int, steps: int) -> None:
    """Raise SboraxError if a run or a sweep has made more steps than it is to make."""
    if done > steps:
        raise SboraxError(f"{place}: has made {done:,} steps, and is to make {steps:,}; give it {done:,} or more")


def record_lengths(runs: Sequence[epath.Path], experiment: Experiment, batches: Batches, done: int, echo: Echo) -> None:
    """Record and print which steps so far had other learning rates than `experiment` gives them.

    Args:
    - runs: directories of runs that step together, whose configs still are those of the steps so far.
    - done: how many steps these are.
    """
    lengths: dict[int, int] = {}
    if done:
        steps, config = length_of(experiment, batches), runs[0] / CONFIG
        before = read_lengths(runs[0]) or {0: length_of(load_experiment(str(config)), batches)}
        former = {start: length for start, length in before.items() if start < done}
        others = [
            f"steps {start + 1:,} to {end:,} had the learning rates of a run of {former[start]:,}"
            for start, end in itertools.pairwise((*former, done))
            if not _same_rates(experiment, former[start], steps, jnp.arange(start, end))
        ]
        if others:
            echo(f"{runs[0]}: {', '.join(others)}, so a run of {steps:,} from the start would differ")
            lengths = former if former[max(former)] == steps else {**former, done: steps}
    for run in runs:
        write_lengths(run, lengths)


def _same_rates(experiment: Experiment, former: int, length: int, steps: Int[Array, " steps"]) -> bool:
    """Whether runs of two lengths have the same learning rates at these steps, as far as the optimiser tells them."""
    before, now = (schedule(experiment.optimizer, number) for number in (former, length))
    if former == length or before is None or now is None:
        return True
    return np.array_equal(jax.vmap(before)(steps), jax.vmap(now)(steps))


def has_computed(place: epath.Path) -> bool:
    """Whether a run directory has checkpoints or adapters: those that started from data, the best and the last one."""
    folders = (place / name for name in (CHECKPOINTS, START, BEST, ADAPTER))
    return any(folder.exists() and any(folder.iterdir()) for folder in folders)
