"""Several runs at once over one base: one load, one compiled step, one copy of the weights."""

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.routing import selective
from sborax.adapters.tree import combine, nodes
from sborax.config.codec import encode
from sborax.config.terminal import say
from sborax.data.batches import Batches
from sborax.layout.state import Parts
from sborax.models.language_model import LanguageModel
from sborax.procedures import Run
from sborax.records.adapter import save_adapter
from sborax.records.checkpoint import FOLDER, open_checkpoints
from sborax.records.claim import claimed, locked
from sborax.records.report import Metrics, Progress, Summary
from sborax.sweep.grid import Member, Sweep
from sborax.sweep.members import Crew, SweepState, gather, member_of, with_member
from sborax.sweep.results import SWEEP, Result, Results, check_same, write_results
from sborax.sweep.steps import Begun, SweepLoop
from sborax.train.experiment import save_experiment
from sborax.train.figures import figures
from sborax.train.log import check_logs, open_logs
from sborax.train.loop import ADAPTER, Echo, preflight, read_data, read_held_out, read_model, set_up
from sborax.train.optimizer import halves
from sborax.train.resume import check_config, has_computed
from sborax.train.stop import Stop, stopping
from sborax.train.turns import turns_of


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
    preflight(first)
    with contextlib.ExitStack() as claims:
        runs = claim_all(place, members, resume, claims)
        return _train_all(description, members, place, runs, resume, echo, stop, began)


def _train_all(
    description: Sweep,
    members: Sequence[Member],
    place: epath.Path,
    runs: Sequence[epath.Path],
    resume: bool,
    echo: Echo,
    stop: Stop,
    began: float,
) -> Results:
    first = members[0].experiment
    echo(f"{len(members)} members: {', '.join(member.name for member in members)}")
    echo(f"loading {first.model} ({first.precision})")
    model = read_model(first)
    echo(f"attention: {model.module.attention}")
    at_once = together(description.at_once, len(members), model.module.attention)
    batches, report = read_data(first, model, echo)
    held_out = read_held_out(first, model, echo)
    for run, member in zip(runs, members, strict=True):
        save_experiment(member.experiment, run)
    if not (place / SWEEP).exists():
        write_results(place, members)
    steps = first.steps or batches.steps(first.epochs or 1.0)
    begun, parts = begin(members, model, batches, runs, steps, echo)
    # What is stacked, rewritten or trained is not kept twice.
    del model
    crew, state = gather(members, parts, steps, at_once, begun.turns[0] if begun.turns else None)
    told = figures(begun.model.config, parts[0], 1)
    del parts
    checkpoints = open_checkpoints(place, first.save.keep)
    done = 0
    if resume:
        restored = checkpoints.restore(state, echo)
        state, done = (state, 0) if restored is None else restored
        crew, state = resumed(begun, crew, state) if restored is not None else (crew, state)
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


def claim_all(
    place: epath.Path, members: Sequence[Member], resume: bool, claims: contextlib.ExitStack
) -> list[epath.Path]:
    """The run directories of the members in `place`, all held until `claims` ends.

    Raises SboraxError if `place` is in use, or by another sweep than the one to resume.
    """
    runs = [place / member.name for member in members]
    claims.enter_context(claimed(place, resume, SWEEP, (SWEEP, FOLDER, *(run.name for run in runs))))
    if resume and (place / SWEEP).exists():
        check_same(place, members)
    for run, member in zip(runs, members, strict=True):
        run.mkdir(parents=True, exist_ok=True)
        claims.enter_context(locked(run))
        check_config(run, member.experiment, has_computed(place))
    return runs


def begin(
    members: Sequence[Member],
    model: LanguageModel,
    batches: Batches,
    runs: Sequence[epath.Path],
    steps: int,
    echo: Echo,
) -> tuple[Begun, list[Parts]]:
    """The members' adapters over one base. Members that start alike are fitted once."""
    starts: dict[str, Any] = {}
    parts, turns = [], []
    for member, run in zip(members, runs, strict=True):
        experiment = member.experiment
        split_by = halves(experiment.optimizer).__name__
        like = json.dumps([encode(experiment.rules), experiment.seed_adapter, split_by])
        fitted = like not in starts
        if fitted:
            starts[like] = set_up(experiment, model, batches, run, (lambda _: None) if starts else echo)
        bare, own, prints, total, chosen = starts[like]
        turn = turns_of(experiment, Run(chosen, steps, model.config.num_key_value_heads), run)
        if turn is not None:
            turns.append(turn)
            own = turn.begin(own) if fitted else own
            starts[like] = bare, own, prints, total, chosen
        parts.append(own)
    bare, one, prints, total, _ = next(iter(starts.values()))
    idle = {path for path, node in nodes(one.adapters).items() if selective(node.method)}
    apart = turns[0].folded if turns else ()
    base = {path: leaf for path, leaf in one.base.items() if path not in apart}
    return Begun(bare, base, prints, total, one.count, idle, tuple(turns)), parts


def resumed(begun: Begun, crew: Crew, state: SweepState) -> tuple[Crew, SweepState]:
    """The crew with what the procedure had made of every member's constant parts."""
    for number, turns in enumerate(begun.turns):
        single, parts = member_of(crew, state, begun.base, number)
        crew, state = with_member(crew, state, number, single, turns.resume(int(single.step), single, parts))
    return crew, state


def finish(loop: SweepLoop, state: SweepState, runs: Sequence[epath.Path], report: str, began: float) -> Results:
    """Write the adapter and the summary of every member."""
    begun, results = loop.begun, []
    made = max(int(step) for step in state.run.step)
    for number, (member, run) in enumerate(zip(loop.members, runs, strict=True)):
        own, parts = member_of(loop.crew, state, begun.base, number)
        ended = int(own.step) == loop.steps
        experiment = member.experiment
        if ended:
            save_adapter(
                run / ADAPTER,
                begun.turns[number].whole(own, parts) if begun.turns else combine(own.train["adapters"], parts.frozen),
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
