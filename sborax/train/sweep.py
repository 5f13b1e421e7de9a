"""Several runs at once over one base: one load, one compiled step, one copy of the weights."""

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from sborax.config import encode
from sborax.core import SboraxError
from sborax.data.batches import Batches
from sborax.models.language_model import LanguageModel
from sborax.routing import selective
from sborax.terminal import say
from sborax.train.adapter import save_adapter
from sborax.train.checkpoint import open_checkpoints
from sborax.train.figures import figures
from sborax.train.grid import Member, Sweep
from sborax.train.log import check_logs, open_logs
from sborax.train.loop import ADAPTER, Echo, claim, read_data, read_held_out, read_model, set_up
from sborax.train.members import SweepState, adapters_of, gather
from sborax.train.report import Metrics, Progress, Summary
from sborax.train.results import SWEEP, Result, Results, check_same, write_results
from sborax.train.state import Parts
from sborax.train.stop import Stop, stopping
from sborax.train.sweep_steps import Begun, SweepLoop
from sborax.tree import combine, nodes


def sweep(description: Sweep, out: str | epath.PathLike, resume: bool = False, echo: Echo = say) -> Results:
    """Train all members of a sweep at once and write `out`: a run directory for each, checkpoints, `sweep.json`.

    resume: continue from the newest whole checkpoint in `out`. SIGTERM and Ctrl-C save one and end in good order.
    A member whose loss is not finite is stopped and reported; the others go on.
    Raises SboraxError for whatever the user can mend, and once no member is left.
    """
    with stopping() as stop:
        return _sweep(description, epath.Path(out), resume, echo, stop)


def _sweep(description: Sweep, place: epath.Path, resume: bool, echo: Echo, stop: Stop) -> Results:
    began = time.monotonic()
    members = description.members()
    first = members[0].experiment
    check_logs(first.log)
    runs = claim_all(place, members, resume)
    echo(f"{len(members)} members: {', '.join(member.name for member in members)}")
    echo(f"loading {first.model} ({first.precision})")
    model = read_model(first)
    echo(f"attention: {model.module.attention}")
    at_once = together(description.at_once, len(members), model.module.attention)
    batches, report = read_data(first, model, echo)
    held_out = read_held_out(first, model, echo)
    steps = first.steps or batches.steps(first.epochs or 1.0)
    begun, parts = begin(members, model, batches, runs, echo)
    # What is stacked, rewritten or trained is not kept twice.
    del model
    crew, state = gather(members, parts, steps, at_once)
    told = figures(begun.model.config, parts[0], 1)
    del parts
    checkpoints = open_checkpoints(place, first.save.keep)
    done = 0
    if resume:
        restored = checkpoints.restore(state, echo)
        state, done = (state, 0) if restored is None else restored
        echo("no checkpoint yet: starting from step 0" if restored is None else f"resuming after step {done:,}")
    progress = Progress(steps, done, echo)
    diverged = {number: int(step) for number, step in enumerate(state.diverged) if step}
    metrics = [Metrics(run, done) for run in runs]
    loop = SweepLoop(
        members, begun, crew, batches, held_out, checkpoints, metrics, steps, done, progress, diverged,
        np.asarray(crew.own.lr), told, stop,
    )  # fmt: skip
    with contextlib.ExitStack() as ends:
        ends.callback(checkpoints.close)
        ends.callback(progress.close)
        loop.logs = [open_logs(one.experiment, run, done, ends) for one, run in zip(members, runs, strict=True)]
        state = loop.run(state)
    results = finish(loop, state, runs, report, began)
    write_results(place, members, results)
    for line in results.table():
        echo(line)
    if results.finished:
        echo(f"done: {place}")
    else:
        echo(f"stopped, saved; --resume goes on from there: {place}")
    return results


def together(asked: int | None, count: int, attention: str) -> int:
    """How many of so many members a step computes at once: as many as asked, by default all but on a CPU one.

    Raises SboraxError for several where attention is cuDNN's, which cannot be told apart by members.
    """
    if attention == "cudnn":
        if asked is not None and asked > 1:
            raise SboraxError(
                "at_once: cuDNN's attention computes one member at a time; set attention=xla or at_once=1"
            )
        return 1
    return asked or (1 if jax.default_backend() == "cpu" else count)


def claim_all(place: epath.Path, members: Sequence[Member], resume: bool) -> list[epath.Path]:
    """The run directories of the members in `place`, each with its own `config.json`.

    Raises SboraxError if `place` is in use, or by another sweep than the one to resume.
    """
    if place.exists() and not place.is_dir():
        raise SboraxError(f"{place}: is a file; choose another directory")
    if not resume and place.exists() and any(place.iterdir()):
        raise SboraxError(
            f"{place}: exists and is not empty; --resume goes on with that sweep, or choose another --out"
        )
    if resume and (place / SWEEP).exists():
        check_same(place, members)
    runs = [place / member.name for member in members]
    for run, member in zip(runs, members, strict=True):
        claim(run, member.experiment, resume)
    if not (place / SWEEP).exists():
        write_results(place, members)
    return runs


def begin(
    members: Sequence[Member], model: LanguageModel, batches: Batches, runs: Sequence[epath.Path], echo: Echo
) -> tuple[Begun, list[Parts]]:
    """The members' adapters over one base. Members that start alike are fitted once."""
    starts: dict[str, Any] = {}
    parts = []
    for member, run in zip(members, runs, strict=True):
        like = json.dumps([encode(member.experiment.rules), member.experiment.seed_adapter])
        if like not in starts:
            starts[like] = set_up(member.experiment, model, batches, run, (lambda _: None) if starts else echo)
        parts.append(starts[like][1])
    bare, one, prints, total, _ = next(iter(starts.values()))
    idle = {path for path, node in nodes(one.adapters).items() if selective(node.method)}
    return Begun(bare, one.base, prints, total, one.count, idle), parts


def finish(loop: SweepLoop, state: SweepState, runs: Sequence[epath.Path], report: str, began: float) -> Results:
    """Write the adapter and the summary of every member."""
    begun, results = loop.begun, []
    made = max(int(step) for step in state.run.step)
    for number, (member, run) in enumerate(zip(loop.members, runs, strict=True)):
        own = jax.tree.map(lambda leaf, number=number: leaf[number], state.run)
        ended = int(own.step) == loop.steps
        experiment = member.experiment
        if ended:
            save_adapter(
                run / ADAPTER,
                combine(own.train["adapters"], adapters_of(loop.crew, number)),
                rules=experiment.rules,
                base=begun.prints,
                trained_base=own.train["base"],
                about={"model": experiment.model, "precision": experiment.precision, "quant": experiment.quant},
            )
        summary = Summary.of(
            loop.metrics[number], loop.speed, began, ended, int(own.step), begun.count, begun.total, report, devices=1
        )
        summary.write(run)
        at = loop.diverged.get(number)
        results.append(Result(member.name, member.changes, int(own.step), at, summary.last_loss, summary.eval_loss))
    return Results(made == loop.steps, time.monotonic() - began, tuple(results))
