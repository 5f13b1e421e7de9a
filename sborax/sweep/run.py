"""Trains the members of a sweep over one base: one load, and for each group of members one compiled step."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from sborax.adapters.core import SboraxError
from sborax.config.codec import encode
from sborax.config.terminal import say
from sborax.data.batches import Batches, Rows, in_order, shuffled
from sborax.layout.state import Parts, parameters
from sborax.models.language_model import LanguageModel
from sborax.records.adapter import fingerprint
from sborax.records.checkpoint import CHECKPOINTS, open_checkpoints
from sborax.records.claim import claimed, locked
from sborax.records.disk import ADAPTER, CONFIG, SOURCES
from sborax.records.report import Metrics, Progress, Summary
from sborax.sweep.grid import Member, Sweep
from sborax.sweep.groups import Group, grouped
from sborax.sweep.members import gather
from sborax.sweep.results import (
    SWEEP,
    Result,
    Results,
    check_same,
    rate_lines,
    read_results,
    rungs,
    write_results,
)
from sborax.sweep.stepper import SweepStepper
from sborax.train.begin import begin
from sborax.train.experiment import Experiment, save_experiment
from sborax.train.figures import figures
from sborax.train.log import check_logs, open_logs
from sborax.train.loop import ending, loop, write_adapter
from sborax.train.optimizer import halves
from sborax.train.prepare import Prepared, prepare
from sborax.train.read import Echo, length_of, preflight, read_held_out_rows, read_model, read_rows, silent
from sborax.train.record import Record
from sborax.train.resume import (
    check_config,
    check_held_out,
    check_sources,
    check_steps,
    has_computed,
    record_lengths,
    set_scores_aside,
)
from sborax.train.stop import Stop, stopping


def sweep(description: Sweep, out: str | epath.PathLike, resume: bool = False, echo: Echo = say) -> Results:
    """Train all members of a sweep and write `out`: a run directory for each, checkpoints, `sweep.json`.

    Members that differ in arrays alone share one program; the programs run one after another over the same base. A
    member whose loss is not finite is stopped and reported; the others continue. SIGTERM and Ctrl-C save a checkpoint
    and end the sweep.

    Args:
    - description: the experiment and the grid.
    - out: the directory of the sweep.
    - resume: continue from the newest undamaged checkpoint in `out`.
    - echo: prints a line.

    Raises SboraxError for mistakes that the user can fix, and if every member has diverged.
    """
    with stopping() as stop:
        return _sweep(description, epath.Path(out), resume, echo, stop)


def _sweep(description: Sweep, place: epath.Path, resume: bool, echo: Echo, stop: Stop) -> Results:
    began = time.monotonic()
    members = description.members()
    groups = grouped(members)
    check_logs(members[0].experiment.log)
    for group in groups:
        preflight(group.members[0].experiment)
    with contextlib.ExitStack() as claims:
        folders = [entry.place(place).name for entry in groups[1:]]
        names = [member.name for member in members]
        claims.enter_context(claimed(place, resume, SWEEP, (SWEEP, SOURCES, CHECKPOINTS, *folders, *names)))
        if (place / SWEEP).exists():
            check_same(place, members, description.auto)
        else:
            write_results(place, members)
        claim_runs(place, groups, claims)
        return _train_all(description, members, groups, place, claims, resume, echo, stop, began)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all programs of a sweep have in common.

    - model: a list with the base. The last program removes it, so that kernels that it rewrites are freed.
    - rows, held_out: of the data and of the held-out data.
    - report: how many records of the data are used.
    - prints: fingerprints of the base.
    - size: parameters of the base.
    - place: the directory of the sweep.
    - began: when the process began, by `time.monotonic`.
    """

    model: list[LanguageModel]
    rows: Rows
    held_out: Rows
    report: str
    prints: dict[str, str]
    size: int
    place: epath.Path
    resume: bool
    echo: Echo
    stop: Stop
    began: float

    def batches(self, experiment: Experiment) -> Batches:
        """The batches of a member."""
        return shuffled(self.rows, experiment.batch_size, experiment.accumulate, experiment.seed_data)

    def steps(self, group: Group) -> int:
        """The steps that the members of a group are to make."""
        first = group.members[0].experiment
        return length_of(first, self.batches(first))

    def goals(self, groups: Sequence[Group]) -> dict[str, int]:
        """How many steps each member is to make, by name."""
        return {member.name: self.steps(group) for group in groups for member in group.members}


def _read(first: Experiment, place: epath.Path, resume: bool, echo: Echo, stop: Stop, began: float) -> Shared:
    """Read the base and the data."""
    echo(f"loading {first.model} ({first.precision})")
    model = read_model(first)
    echo(f"attention: {model.module.attention}")
    rows, report = read_rows(first.data, model, echo)
    held_out = read_held_out_rows(first, model, echo)
    prints, size = fingerprint(model.params), parameters(model.params)
    return Shared([model], rows, held_out, report, prints, size, place, resume, echo, stop, began)


def _train_all(
    description: Sweep,
    members: Sequence[Member],
    groups: Sequence[Group],
    place: epath.Path,
    claims: contextlib.ExitStack,
    resume: bool,
    echo: Echo,
    stop: Stop,
    began: float,
) -> Results:
    echo(f"{len(members)} members: {', '.join(member.name for member in members)}")
    shared = _read(members[0].experiment, place, resume, echo, stop, began)
    goals = shared.goals(groups)
    fresh = Results.of(members, groups, rungs(description.halving, goals))
    stored = read_results(place)
    if stored is not None and stored.halving != fresh.halving:
        halving = f"with halving at {','.join(map(str, stored.halving))}" if stored.halving else "without halving"
        raise SboraxError(f"{place}: holds a sweep {halving}; resume it in the same way")
    results = fresh if stored is None else stored.including(fresh)
    # A sweep that is not finished may have members beside these, which the search for a learning rate has added.
    if stored is None or not stored.finished or unfinished(results, goals):
        places = [place for group in groups for place in (group.place(shared.place), *group.runs(shared.place))]
        computed = any(map(has_computed, places))
        check_sources(place, members[0].experiment, shared.prints, shared.rows, shared.held_out, computed)
    has_members = True
    while has_members:
        results = _train_groups(description, groups, shared, results)
        losses = {result.name: result.loss for result in results.members}
        added = description.extended(members, losses) if description.auto and not unfinished(results, goals) else ()
        if has_members := bool(added):
            echo(f"{len(added)} more, since the best learning rate is at an end: {', '.join(m.name for m in added)}")
            groups, members = grouped(added, groups[-1].number), (*members, *added)
            claim_runs(place, groups, claims)
            goals |= shared.goals(groups)
            results = results.including(Results.of(added, groups))
    if stored is None or not stored.finished or results.members != stored.members:
        stored = None
        seconds = time.monotonic() - began
        results = dataclasses.replace(results, finished=not unfinished(results, goals), seconds=seconds)
        write_results(place, members, results)
    if all(result.diverged for result in results.members):
        last = max(result.diverged or 0 for result in results.members)
        raise SboraxError(
            f"step {last}: no member is left, all {len(members)} have a loss that is not finite; lower optimizer.lr or "
            "look at the data"
        )
    end = f"done: {place}" if results.finished else f"stopped, saved; --resume continues from there: {place}"
    end = end if stored is None else f"already finished after step {max(goals.values()):,}: {place}"
    for line in [*results.table(), *(rate_lines(members, results) if description.auto else ()), end]:
        echo(line)
    return results


def unfinished(results: Results, goals: Mapping[str, int]) -> bool:
    """Whether a member has steps left to make, by the goals of the members that this process trains."""
    return any(not result.over(goals[result.name]) for result in results.members if result.name in goals)


def _train_groups(description: Sweep, groups: Sequence[Group], shared: Shared, results: Results) -> Results:
    """Train the members of some groups, from rung to rung. A signal ends this early."""
    for group in groups if len(groups) > 1 else ():
        shared.echo(f"program {group.number}: {', '.join(member.name for member in group.members)}")
    attention = shared.model[0].module.attention
    at_once = {group.number: members_at_once(description.at_once, len(group.members), attention) for group in groups}
    for rung in (*results.halving, None):
        # With one program, and none to come, nothing needs the base as it was.
        last = None if results.halving or description.auto else groups[-1]
        for group in groups:
            running, until = results.running(group.members), rung or shared.steps(group)
            if all(is_over(results, member, shared.place, until, rung is None) for member in group.members):
                for member, run in zip(group.members, group.runs(shared.place), strict=True):
                    save_experiment(member.experiment, run)
            elif not shared.stop.asked.is_set():
                trained = train_group(shared, group, running, at_once[group.number], until, group is last)
                results = results.updated(trained)
                write_results(shared.place, (), results)
        if shared.stop.asked.is_set():
            break
        if rung is not None:
            before, results = results, results.halved(rung)
            stopped = [new.name for new, old in zip(results.members, before.members, strict=True) if new != old]
            if stopped:
                write_results(shared.place, (), results)
                shared.echo(f"step {rung:,}: {len(stopped)} of {len(results.members)} stop: {', '.join(stopped)}")
    return results


def is_over(results: Results, member: Member, place: epath.Path, until: int, end: bool) -> bool:
    """Whether a member has made its steps, and nothing of it is left to write.

    - until: how many steps.
    - end: whether these are all of the run.
    """
    result, run = results.of_member(member), place / member.name
    if result.diverged or result.stopped:
        return Summary.read(run) is not None
    return ending(run, until) is not None if end else result.steps >= until


def train_group(
    shared: Shared, group: Group, running: Sequence[int], at_once: int, until: int, last: bool
) -> list[Result]:
    """Train members of a group by one program, and write their run directories.

    - running: numbers of the members that go on. The others have stopped, and keep their state.
    - at_once: how many a step computes together.
    - until: the step after which they pause, or end.
    - last: whether no other program needs the base after it.
    """
    members, first, echo = group.members, group.members[0].experiment, shared.echo
    place, runs = group.place(shared.place), group.runs(shared.place)
    batches, steps = shared.batches(first), shared.steps(group)
    held_out = in_order(shared.held_out, first.batch_size)
    model = shared.model.pop() if last else shared.model[0]
    prepared, parts = begin_members(members, model, batches, runs, steps, echo)
    # A second reference would keep a base alive that the adapters have rewritten.
    del model
    procedure, trained = prepared[0].procedure, parts[0].count
    stacked, state = gather(members, parts, steps, at_once, procedure)
    folded = prepared[0].folded
    base = {path: leaf for path, leaf in parts[0].base.items() if path not in folded}
    step_figures = figures(prepared[0].model.config, parts[0], 1)
    del parts
    checkpoints = open_checkpoints(place, first.save.keep)
    restored = checkpoints.restore(state, echo)
    state, done = (state, 0) if restored is None else restored
    check_steps(place, done, steps)
    record_lengths(runs, first, batches, done, echo)
    # A changed config replaces that of a member once nothing refuses it any more.
    for run, member in zip(runs, members, strict=True):
        save_experiment(member.experiment, run)
    progress = Progress(steps, done, echo)
    with contextlib.ExitStack() as ends:
        ends.callback(checkpoints.close)
        ends.callback(progress.close)
        records = {}
        for number in running:
            run, experiment = runs[number], members[number].experiment
            records[number] = Record(Metrics(run, done), step_figures, open_logs(experiment, run, done, ends))
        stacked = dataclasses.replace(stacked, running=None if len(running) == len(members) else tuple(running))
        stepper = SweepStepper(members, prepared, stacked, state, base, records, progress)
        # The first step donates their buffers.
        del stacked, state
        if restored is not None:
            stepper.replay()
            echo(f"resuming after step {done:,}")
        elif shared.resume:
            echo("no checkpoint yet: starting from step 0")
        progress.say("compiling")
        loop(stepper, first, batches, held_out, checkpoints, until, done, shared.stop)
    return write_members(stepper, group, shared, trained, steps)


def members_at_once(at_once: int | None, count: int, attention: str) -> int:
    """How many of `count` members a step computes at once: `at_once`, by default one on a CPU and all elsewhere.

    Raises SboraxError for several with cuDNN's attention, whose rule for `vmap` knows no masks.
    """
    if attention == "cudnn":
        if at_once is not None and at_once > 1:
            raise SboraxError(
                "at_once: cuDNN's attention computes one member at a time; set attention=xla or at_once=1"
            )
        return 1
    return at_once or (1 if jax.default_backend() == "cpu" else count)


def claim_runs(place: epath.Path, groups: Sequence[Group], claims: contextlib.ExitStack) -> None:
    """Make the run directories of the members in `place`, locked until `claims` ends.

    Raises SboraxError if one is in use, or if its config differs in a field that a resumed run may not change, or in
    the held-out data.
    """
    for group in groups:
        for run, member in zip(group.runs(place), group.members, strict=True):
            run.mkdir(parents=True, exist_ok=True)
            claims.enter_context(locked(run))
            computed = has_computed(group.place(place)) or has_computed(run)
            check_config(run, member.experiment, computed)
            if computed and (run / CONFIG).exists():
                remedy = "members are compared on the same data, so begin a new sweep"
                check_held_out(run, member.experiment, remedy)


def begin_members(
    members: Sequence[Member],
    model: LanguageModel,
    batches: Batches,
    runs: Sequence[epath.Path],
    steps: int,
    echo: Echo,
) -> tuple[list[Prepared], list[Parts]]:
    """Prepare every member, and make its adapters over the one base. Members with equal adapters share them."""
    starts: dict[str, tuple[Prepared, Parts]] = {}
    begun = []
    for member, run in zip(members, runs, strict=True):
        experiment = member.experiment
        split = halves(experiment.optimizer).__name__
        key = json.dumps([encode(experiment.rules), experiment.seed_adapter, split])
        if key not in starts:
            prepared = prepare(experiment, model, steps, run)
            starts[key] = begin(prepared, model, batches, run, silent if starts else echo)
        prepared, parts = starts[key]
        procedure = prepared.procedure and dataclasses.replace(prepared.procedure, place=run)
        begun.append((dataclasses.replace(prepared, experiment=experiment, procedure=procedure), parts))
    prepared, parts = zip(*begun, strict=True)
    return list(prepared), list(parts)


def write_members(stepper: SweepStepper, group: Group, shared: Shared, trained: int, steps: int) -> list[Result]:
    """Write the summary of every member that goes on, and the adapter of each that made all steps.

    - trained: how many parameters.
    """
    results = []
    for number, record in stepper.records.items():
        member, prepared = stepper.members[number], stepper.prepared[number]
        run, (state, parts) = shared.place / member.name, stepper.member(number)
        done = int(state.step)
        if done == steps:
            set_scores_aside(run, steps, shared.echo)
            write_adapter(prepared, shared.prints, state, parts, run / ADAPTER, step=done)
        metrics, diverged = record.metrics, stepper.diverged.get(number)
        summary = Summary.of(
            metrics, stepper.speed, shared.began, done == steps, done, trained, shared.size, shared.report, devices=1
        )
        summary.write(run)
        dropped = metrics.dropped()
        if dropped is not None:
            shared.echo(f"{member.name}: {dropped}")
        results.append(
            Result(member.name, member.changes, group.number, done, diverged, summary.last_loss, summary.eval_loss)
        )
    return results
