"""Several runs of one base as the target of `generate` and `eval`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.paths import as_rules
from sborax.adapters.rows import together
from sborax.cli.targets import Target, find_run, load_onto
from sborax.config.terminal import say
from sborax.models import load_model
from sborax.records.adapter import PLAN
from sborax.records.best import BEST
from sborax.records.disk import ADAPTER
from sborax.sweep.results import SWEEP, read_members
from sborax.train.base import rewritten


def check_single(arguments: argparse.Namespace, *options: str) -> None:
    """Raise SboraxError if one of these options, which are for a single target, is given."""
    for option in options:
        if getattr(arguments, option):
            raise SboraxError(f"--{option}: is for one target; give one, or leave --{option} out")


def expand(targets: Sequence[str]) -> list[str]:
    """The targets of a command, with the members of a sweep in its place: those that have an adapter.

    Raises SboraxError for a target that is given twice, and for a sweep without an adapter.
    """
    paths: list[str] = []
    for target in targets:
        place = epath.Path(target)
        if not (place / SWEEP).exists():
            paths.append(target)
            continue
        names = [member["name"] for member in read_members(place)]
        runs = [f"{target.rstrip('/')}/{name}" for name in names if (place / name / ADAPTER / PLAN).exists()]
        if not runs:
            raise SboraxError(f"{target}: none of its members has ended; continue it with `sborax sweep ... --resume`")
        paths += runs
    # However a path is written, it is one run.
    places = [epath.Path(target).resolve() for target in paths]
    repeated = next((target for number, target in enumerate(paths) if places[number] in places[:number]), None)
    if repeated is not None:
        raise SboraxError(f"{repeated}: is given twice; leave it out once")
    return paths


def load_several(targets: Sequence[str]) -> list[Target]:
    """Runs over one base, which is loaded once; what a run leaves as it was is the same arrays for all.

    Raises SboraxError for a target that is no run, and for runs of different bases.
    """
    runs = [find_run(target) for target in targets]
    first = runs[0][0]
    for target, (experiment, _) in zip(targets, runs, strict=True):
        for name in ("model", "precision", "quant"):
            left, right = getattr(first, name), getattr(experiment, name)
            if left != right:
                raise SboraxError(f"{target}: {name} is {right}, that of {targets[0]} is {left}; give runs of one base")
    # Kernels that any of them rewrites are loaded dense.
    predicates = [rewritten(as_rules(experiment.rules)) for experiment, _ in runs]
    model = load_model(
        first.model, first.precision, quant=first.quant, keep=lambda path: any(keep(path) for keep in predicates)
    )
    return [load_onto(model, experiment, adapter) for experiment, adapter in runs]


def labels(targets: Sequence[str]) -> list[str]:
    """A name for each target: the last part of its path where that tells them apart, else all of it."""
    short = [_last(Path(target)) for target in targets]
    return short if len(set(short)) == len(short) else [target.strip("/").replace("/", "_") for target in targets]


def _last(path: Path) -> str:
    return f"{path.parent.name}-{BEST}" if path.name == BEST else path.name


def say_batches(targets: Sequence[str], loaded: Sequence[Target]) -> None:
    """Print which targets share a batch, and which go by themselves."""
    names = labels(targets)
    for group in together([target.params for target in loaded], [target.adapters for target in loaded]):
        say(f"{'in one batch' if len(group) > 1 else 'alone'}: {', '.join(names[number] for number in group)}")
