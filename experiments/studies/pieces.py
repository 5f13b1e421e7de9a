"""Runs a piece and makes its result: a small JSON file."""

import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

import sborax as sx
from experiments.studies.items import batches_of, digests, held_out, scorer
from experiments.studies.study import Base, Piece
from sborax.cli.targets import Target, load_run
from sborax.models import load_model
from sborax.records.claim import InUse
from sborax.records.report import Summary, git_revision
from sborax.sweep.run import sweep
from sborax.train.loop import train
from sborax.train.read import read_model
from sborax.train.stop import Stopped

POINTS = 20
"""Points of a training curve."""


def run_piece(piece: Piece, work: Path, echo: Callable[[str], None]) -> dict[str, Any]:
    """Train a piece in a directory below `work`, and return its result.

    A piece that was killed continues from its last checkpoint; if that cannot be read, it begins again.
    Raises Stopped after a signal.
    """
    began = time.monotonic()
    place = work / piece.digest
    try:
        members = train_members(piece, place, place.exists(), echo)
    except InUse:
        raise
    except sx.SboraxError as error:
        if not place.exists():
            raise
        echo(f"{place}: begun again ({error})")
        shutil.rmtree(place)
        members = train_members(piece, place, False, echo)
    result = {
        "config": piece.config,
        "arm": piece.arm.name,
        "setting": piece.arm.setting,
        "seed": piece.seed,
        **provenance(),
        "members": list(map(described, members, piece.rates)),
    }
    alive = [(member, numbers) for member, numbers in zip(members, result["members"], strict=True) if "loss" in numbers]
    result |= add_losses(piece, alive)
    result["seconds"] = round(time.monotonic() - began, 1)
    return result


def measure_base(base: Base) -> dict[str, Any]:
    """The losses of kept text of a model that was not trained."""
    began = time.monotonic()
    model = load_model(base.model, base.precision)
    samples = held_out(base.kept, model)
    losses = scorer(model)(Target(model, model.params, None, None), batches_of(samples, base.kept))
    return {
        "config": base.config,
        **provenance(),
        "kept": [digits(float(loss)) for loss in losses],
        "kept_digests": digests(samples),
        "seconds": round(time.monotonic() - began, 1),
    }


def provenance() -> dict[str, Any]:
    """The program and the device that make a result."""
    return {"version": sx.__version__, "commit": git_revision(), "jax": jax.__version__, "device": device()}


def train_members(piece: Piece, place: Path, resume: bool, echo: Callable[[str], None]) -> list[Path]:
    """Train a member for every learning rate; their run directories. Raises Stopped after a signal."""
    grid = None if len(piece.rates) == 1 else sx.Sweep(piece.experiment, {"optimizer.lr": piece.rates})
    runs = [place] if grid is None else [place / member.name for member in grid.members()]
    try:
        if grid is None:
            finished = train(piece.experiment, place, resume=resume, echo=echo).finished
        else:
            finished = sweep(grid, place, resume=resume, echo=echo).finished
    except sx.SboraxError as error:
        # A run ends with an error where its loss is not finite, a sweep where that leaves no member. Such rates are a
        # result here.
        if not any(reason in str(error) for reason in ("not finite, stopped", "no member is left")):
            raise
        return runs
    if not finished:
        raise Stopped("a signal ended the piece, which is saved")
    return runs


def described(run: Path, rate: float) -> dict[str, Any]:
    """What a run directory says of a member. One that diverged has a rate alone."""
    # A run whose first step is not finite leaves no file.
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [line["loss"] for line in lines if "loss" in line]
    if not (run / "adapter").exists():
        return {"lr": rate, "diverged": len(losses) + 1}
    summary = Summary.read(epath.Path(run))
    assert summary is not None
    return {
        "lr": rate,
        "trained": summary.trainable_parameters,
        "loss": digits(sum(losses[-10:]) / len(losses[-10:])),
        "area": digits(sum(losses) / len(losses)),
        "curve": [digits(loss) for loss in thinned(losses)],
    }


def thinned(losses: list[float]) -> list[float]:
    """At most `POINTS` means of consecutive losses."""
    count = min(POINTS, len(losses))
    cuts = [len(losses) * place // count for place in range(count + 1)]
    return [sum(losses[low:high]) / (high - low) for low, high in zip(cuts, cuts[1:], strict=False)]


def digits(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


def add_losses(piece: Piece, members: list[tuple[Path, dict[str, Any]]]) -> dict[str, str]:
    """Write the losses of all items, and of kept text, into the numbers of each member; returns their digests.

    `items` of a member are the losses one by one, `items_loss` is their mean; `kept` and `kept_loss` likewise.
    """
    model = read_model(piece.experiment)
    samples = {"items": held_out(piece.arm.held, model)}
    batches = {"items": batches_of(samples["items"], piece.arm.held)}
    if piece.arm.kept is not None:
        samples["kept"] = held_out(piece.arm.kept, model)
        batches["kept"] = batches_of(samples["kept"], piece.arm.kept)
    score = None
    for run, numbers in members:
        target = load_run(str(run))
        score = score or scorer(target.model)
        losses = {name: score(target, batch) for name, batch in batches.items()}
        if not all(np.isfinite(values).all() for values in losses.values()):
            numbers["diverged"] = piece.arm.experiment.steps
            continue
        for name, values in losses.items():
            numbers[f"{name}_loss"] = digits(float(values.mean()))
            numbers[name] = [digits(float(loss)) for loss in values]
    return {f"{name}_digests": digests(group) for name, group in samples.items()}


def device() -> str:
    """The kind of CPU and its cores, or the kind of accelerator."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
