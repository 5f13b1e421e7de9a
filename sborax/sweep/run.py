"""Trains the members of a sweep: one load, one compiled step, one copy of the base."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence

import jax
from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.tree import combine
from sborax.config.codec import encode
from sborax.config.terminal import say
from sborax.data.batches import Batches
from sborax.layout.state import Parts, parameters
from sborax.models.language_model import LanguageModel
from sborax.records.adapter import fingerprint, save_adapter
from sborax.records.checkpoint import CHECKPOINTS, open_checkpoints
from sborax.records.claim import claimed, locked
from sborax.records.report import Metrics, Progress, Summary
from sborax.sweep.grid import Member, Sweep
from sborax.sweep.members import gather
from sborax.sweep.results import SWEEP, Result, Results, check_same, read_results, write_results
from sborax.sweep.stepper import SweepStepper
from sborax.train.begin import begin
from sborax.train.experiment import save_experiment
from sborax.train.figures import figures
from sborax.train.log import check_logs, open_logs
from sborax.train.loop import ADAPTER, ending, loop
from sborax.train.optimizer import halves
from sborax.train.prepare import Prepared, prepare
from sborax.train.read import Echo, preflight, read_data, read_held_out, read_model, silent
from sborax.train.record import Record
from sborax.train.resume import check_config, check_steps, has_computed
from sborax.train.stop import Stop, stopping


def sweep(description: Sweep, out: str | epath.PathLike, resume: bool = False, echo: Echo = say) -> Results:
    """Train all members of a sweep at once and write `out`: a run directory for each, checkpoints, `sweep.json`.

    A member whose loss is not finite is stopped and reported; the others go on. SIGTERM and Ctrl-C save a checkpoint
    and end the sweep.

    Args:
    - description: the experiment and the grid.
    - out: the directory of the sweep.
    - resume: continue from the newest undamaged checkpoint in `out`.
    - echo: prints a line.

    Raises SboraxError for whatever the user can mend, and once every member has diverged.
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
        runs = claim_members(place, members, resume, claims)
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
    at_once = members_at_once(description.at_once, len(members), model.module.attention)
    (batches, report), held_out = read_data(first, model, echo), read_held_out(first, model, echo)
    steps = first.steps or batches.steps(first.epochs or 1.0)
    prints, base_size = fingerprint(model.params), parameters(model.params)
    prepared, parts = begin_members(members, model, batches, runs, steps, echo)
    # A second reference would keep a base alive that the adapters have rewritten.
    del model
    procedure, trained = prepared[0].procedure, parts[0].count
    stacked, state = gather(members, parts, steps, at_once, procedure)
    folded = procedure.folded if procedure is not None else ()
    base = {path: leaf for path, leaf in parts[0].base.items() if path not in folded}
    step_figures = figures(prepared[0].model.config, parts[0], 1)
    del parts
    checkpoints = open_checkpoints(place, first.save.keep)
    restored = checkpoints.restore(state, echo) if resume else None
    state, done = (state, 0) if restored is None else restored
    check_steps(place, done, steps)
    # A changed config replaces that of a member once nothing refuses it any more.
    for run, member in zip(runs, members, strict=True):
        save_experiment(member.experiment, run)
    if done == steps and (results := finished_results(place, runs, steps)) is not None:
        checkpoints.close()
        return _print_results(results, f"already finished after step {done:,}: {place}", echo)
    progress = Progress(steps, done, echo)
    with contextlib.ExitStack() as ends:
        ends.callback(checkpoints.close)
        ends.callback(progress.close)
        records = [
            Record(Metrics(run, done), step_figures, open_logs(member.experiment, run, done, ends))
            for member, run in zip(members, runs, strict=True)
        ]
        stepper = SweepStepper(members, prepared, stacked, state, base, records, progress)
        # The first step donates their buffers.
        del stacked, state
        if restored is not None:
            stepper.replay()
            echo(f"resuming after step {done:,}")
        elif resume:
            echo("no checkpoint yet: starting from step 0")
        progress.say("compiling")
        loop(stepper, first, batches, held_out, checkpoints, steps, done, stop)
    results = write_members(stepper, runs, Sizes(prints, trained, base_size), report, steps, began)
    write_results(place, members, results)
    end = f"done: {place}" if results.finished else f"stopped, saved; --resume goes on from there: {place}"
    return _print_results(results, end, echo)


def _print_results(results: Results, last: str, echo: Echo) -> Results:
    """The results, once their table and the last line are printed."""
    for line in [*results.table(), last]:
        echo(line)
    return results


def finished_results(place: epath.Path, runs: Sequence[epath.Path], steps: int) -> Results | None:
    """The results of a sweep that has made its `steps` and written all adapters; None if something is left to write."""
    results = read_results(place)
    if results is None or not results.finished:
        return None
    for result, run in zip(results.members, runs, strict=True):
        summary = Summary.read(run) if result.diverged else ending(run, steps)
        if summary is None:
            return None
    return results


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


def claim_members(
    place: epath.Path, members: Sequence[Member], resume: bool, claims: contextlib.ExitStack
) -> list[epath.Path]:
    """The run directories of the members in `place`, made and locked until `claims` ends, beside `sweep.json`.

    Raises SboraxError if a directory is in use, and, to resume, if `place` holds another sweep.
    """
    runs = [place / member.name for member in members]
    claims.enter_context(claimed(place, resume, SWEEP, (SWEEP, CHECKPOINTS, *(run.name for run in runs))))
    if (place / SWEEP).exists():
        check_same(place, members)
    else:
        write_results(place, members)
    for run, member in zip(runs, members, strict=True):
        run.mkdir(parents=True, exist_ok=True)
        claims.enter_context(locked(run))
        check_config(run, member.experiment, has_computed(place) or has_computed(run))
    return runs


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
            starts[key] = prepared, begin(prepared, model, batches, run, silent if starts else echo)
        prepared, parts = starts[key]
        procedure = prepared.procedure and dataclasses.replace(prepared.procedure, place=run)
        begun.append((dataclasses.replace(prepared, experiment=experiment, procedure=procedure), parts))
    prepared, parts = zip(*begun, strict=True)
    return list(prepared), list(parts)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the summaries of all members share.

    - prints: fingerprints of the base.
    - trained, base: numbers of parameters.
    """

    prints: dict[str, str]
    trained: int
    base: int


def write_members(
    stepper: SweepStepper,
    runs: Sequence[epath.Path],
    sizes: Sizes,
    report: str,
    steps: int,
    began: float,
) -> Results:
    """Write the summary of every member, and the adapter of each that made all steps."""
    results = []
    for number, (member, prepared, run) in enumerate(zip(stepper.members, stepper.prepared, runs, strict=True)):
        state, parts = stepper.member(number)
        made, experiment, procedure = int(state.step), member.experiment, prepared.procedure
        if made == steps:
            save_adapter(
                run / ADAPTER,
                procedure.adapters(state, parts) if procedure else combine(state.train["adapters"], parts.frozen),
                rules=experiment.rules,
                base=sizes.prints,
                trained_base=state.train["base"],
                about={"model": experiment.model, "precision": experiment.precision, "quant": experiment.quant},
            )
        metrics = stepper.records[number].metrics
        summary = Summary.of(
            metrics, stepper.speed, began, made == steps, made, sizes.trained, sizes.base, report, devices=1
        )
        summary.write(run)
        diverged = stepper.diverged.get(number)
        results.append(Result(member.name, member.changes, made, diverged, summary.last_loss, summary.eval_loss))
    most = max(int(step) for step in stepper.state.run.step)
    return Results(most == steps, time.monotonic() - began, tuple(results))
