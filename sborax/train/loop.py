"""From an `Experiment` to a run directory: `train`, and the loop of every run and every sweep."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.tree import combine
from sborax.config.codec import encode
from sborax.config.terminal import say
from sborax.data.batches import Batch, Batches, in_order
from sborax.data.stream import stream
from sborax.layout.hosts import asked_to_stop, check_alike, gathered, held, is_first, on_first, several
from sborax.layout.sharding import Layout
from sborax.layout.state import Parts, TrainState, parameters
from sborax.models.language_model import LanguageModel
from sborax.records.adapter import PLAN, fingerprint, save_adapter
from sborax.records.best import best_so_far
from sborax.records.checkpoint import Checkpoints, open_checkpoints
from sborax.records.claim import claimed
from sborax.records.disk import ADAPTER, CONFIG
from sborax.records.report import Metrics, Progress, Summary
from sborax.records.trace import make_trace
from sborax.train.begin import begin
from sborax.train.experiment import Experiment, save_experiment
from sborax.train.figures import figures
from sborax.train.log import check_logs, open_logs
from sborax.train.prepare import Prepared, prepare
from sborax.train.read import Echo, length_of, preflight, read_data, read_held_out_rows, read_model, silent
from sborax.train.record import DispatchedStep, Record
from sborax.train.resume import (
    check_config,
    check_held_out,
    check_sources,
    check_steps,
    has_computed,
    record_lengths,
    set_scores_aside,
)
from sborax.train.stepper import AbstractStepper, RunStepper
from sborax.train.stop import Stop, stopping


def train(
    experiment: Experiment, out: str | epath.PathLike, resume: bool = False, echo: Echo = say, profile: bool = False
) -> Summary:
    """Run `experiment` and write the run directory `out`: config, metrics, checkpoints, adapter, summary.

    SIGTERM and Ctrl-C save a checkpoint and end the run cleanly.

    Args:
    - resume: continue from the newest complete checkpoint in `out`; on one machine the bits are those of a run that was
        never interrupted.
    - echo: prints a line.
    - profile: write an xprof trace of a few steps to `profile/` of the run directory.

    Raises SboraxError for mistakes that the user can fix, and for a loss that is not finite (the last checkpoint
    stays).
    """
    with stopping() as stop:
        check_logs(experiment.log)
        layout = Layout.of(experiment.mesh, experiment.batch_size)
        run = epath.Path(out)
        preflight(experiment)
        with contextlib.ExitStack() as ends:
            on_first(lambda: ends.enter_context(claim(run, experiment, resume)))
            with layout.context():
                return _train(experiment, run, resume, layout, echo if is_first() else silent, profile, stop)


@contextlib.contextmanager
def claim(run: epath.Path, experiment: Experiment, resume: bool) -> Iterator[None]:
    """Holds the run directory for this process while the block runs.

    Raises SboraxError if it is in use, or if its config differs in a field that a resumed run may not change.
    """
    with claimed(run, resume):
        if resume:
            check_config(run, experiment, has_computed(run))
        yield


def _train(
    experiment: Experiment, run: epath.Path, resume: bool, layout: Layout, echo: Echo, profile: bool, stop: Stop
) -> Summary:
    began, computed = time.monotonic(), has_computed(run)

    # Read the base and the data.
    model = _read_base(experiment, layout, echo)
    batches, report = read_data(experiment, model, echo)
    held_out_rows = read_held_out_rows(experiment, model, echo)
    held_out = in_order(held_out_rows, experiment.batch_size)
    steps = length_of(experiment, batches)

    # Prepare the run: adapters on the base, the optimiser's state, and where both lie.
    prints, total = fingerprint(model.params), parameters(model.params)
    prepared = prepare(experiment, model, steps, run, layout)
    prepared, parts = begin(prepared, model, batches, run, echo)
    parts = layout.place(parts, model.config)
    # A second reference would keep a base alive that the adapters have rewritten.
    del model
    if layout.mesh is not None:
        echo(f"mesh: {layout} of {len(jax.devices())} devices")
    state, shardings = layout.state(prepared.start(parts))

    # Restore the newest checkpoint, if there is one. A run directory has a config before anything else.
    on_first(lambda: None if (run / CONFIG).exists() else save_experiment(experiment, run))
    checkpoints = open_checkpoints(run, experiment.save.keep)
    state, done = _restore(checkpoints, state, run, resume, echo)
    check_steps(run, done, steps)
    summary = ending(run, steps) if done == steps else None
    if summary is not None:
        remedy = "the run has ended: measure on other data with `sborax eval`, or make more steps"
        on_first(lambda: check_held_out(run, experiment, remedy))
    else:
        on_first(lambda: check_sources(run, experiment, prints, batches.rows, held_out_rows, computed))
        on_first(lambda: record_lengths([run], experiment, batches, done, echo))
    # A changed config replaces that of the run once nothing can refuse it.
    on_first(lambda: save_experiment(experiment, run))
    if summary is not None:
        checkpoints.close()
        echo(f"already finished after step {done:,}: {run}")
        return summary
    if done:
        parts = parts if prepared.procedure is None else prepared.procedure.replay(done, state, parts)
        echo(f"resuming after step {done:,}")

    # Step, until the end or a signal.
    progress, metrics, trainable = Progress(steps, done, echo), Metrics(run, done, is_first()), parts.count
    write = functools.partial(write_adapter, prepared, prints)
    with contextlib.ExitStack() as ends:
        ends.callback(checkpoints.close)
        ends.callback(progress.close)
        logs = open_logs(experiment, run, done, ends) if is_first() else ()
        record = Record(metrics, figures(prepared.model.config, parts, layout.devices), logs)
        data = encode(experiment)["eval"]["data"]
        best = best_so_far(run, data, done, echo, is_first()) if experiment.save.best else None
        trace = make_trace(run, done, steps) if profile else None
        if trace is not None:
            ends.callback(trace.close)
        stepper = RunStepper(prepared, state, parts, record, progress, layout, shardings, best, trace, write)
        # The first step takes over the buffers of the state; a procedure replaces weights of the base.
        del state, parts
        progress.say("compiling")
        loop(stepper, experiment, batches, held_out, checkpoints, steps, done, stop, layout)

    # Write the adapter and the summary.
    step = int(stepper.state.step)
    finished = step == steps
    if finished:
        on_first(lambda: set_scores_aside(run, steps, echo))
        write(stepper.state, stepper.parts, run / ADAPTER, step=step)
    summary = Summary.of(
        metrics, stepper.speed, began, finished, step, trainable, total, samples=report, devices=layout.devices
    )
    if is_first():
        summary.write(run)
    dropped = metrics.dropped()
    if dropped is not None:
        echo(dropped)
    echo(f"done: {run}" if finished else f"stopped after step {step:,}, saved; --resume continues from there")
    return summary


def _read_base(experiment: Experiment, layout: Layout, echo: Echo) -> LanguageModel:
    """The base of a run. Prints its name and, on several hosts, how much of it this host has read."""
    echo(f"loading {experiment.model} ({experiment.precision})")
    model = read_model(experiment, layout)
    echo(f"attention: {model.module.attention}")
    if several():
        share, total = held(model.params)
        echo(f"weights: {share:,} of {total:,} bytes on this host")
    return model


def _restore(
    checkpoints: Checkpoints, state: TrainState, run: epath.Path, resume: bool, echo: Echo
) -> tuple[TrainState, int]:
    """The state of the newest checkpoint and its step; `state` and 0 if there is none.

    Raises SboraxError for checkpoints in the directory of a run that is not resumed, and if hosts find different ones.
    """
    if not resume:
        if checkpoints.steps:
            raise SboraxError(f"{run}: holds checkpoints of another run; resume it or choose another directory")
        return state, 0
    restored = checkpoints.restore(state, echo)
    check_alike("checkpoints", 0 if restored is None else restored[1])
    if restored is None:
        echo("no checkpoint yet: starting from step 0")
        return state, 0
    return restored


def write_adapter(
    prepared: Prepared, prints: dict[str, str], state: TrainState, parts: Parts, place: epath.Path, **notes: Any
) -> None:
    """Write the adapters of a run, and trained leaves of its base, into the directory `place`.

    Args:
    - prints: fingerprints of the base that the run began with.
    - notes: further entries of `plan.json`.

    Raises SboraxError if the disk refuses.
    """
    experiment, procedure = prepared.experiment, prepared.procedure
    adapters = procedure.adapters(state, parts) if procedure else combine(state.train["adapters"], parts.frozen)
    # All processes gather the arrays, the first one writes them.
    adapters, trained_base = gathered((adapters, {**state.train["base"], **parts.tokens}))
    about = {"model": experiment.model, "precision": experiment.precision, "quant": experiment.quant, **notes}
    if is_first():
        save_adapter(place, adapters, rules=experiment.rules, base=prints, trained_base=trained_base, about=about)


def ending(run: epath.Path, steps: int) -> Summary | None:
    """The summary of a run that has made its `steps` and written its adapter; None if it has anything left to do."""
    summary = Summary.read(run)
    complete = summary is not None and summary.finished and summary.steps == steps and (run / ADAPTER / PLAN).exists()
    return summary if complete else None


def loop(
    stepper: AbstractStepper,
    experiment: Experiment,
    batches: Batches,
    held_out: Sequence[Batch],
    checkpoints: Checkpoints,
    steps: int,
    done: int,
    stop: Stop,
    layout: Layout = Layout(),
) -> None:
    """Run the stepper until `steps` are done, a signal arrives, or the stepper has ended.

    Each iteration is: data, step, record, act, evaluate, save.

    Args:
    - held_out: batches for the held-out loss; empty for none.
    - done: steps that have been made before.

    Raises SboraxError for a loss, gradient or update that is not finite, and in the first step for an adapter without
    a gradient.
    """
    recorder = _Recorder(stepper, done, done or None)
    pending, rows = None, layout.rows(experiment.batch_size)
    source = stream(lambda number: batches.part(number, rows), done, steps)
    with stop.in_good_order() as request, source as arrays:
        for number, batch in enumerate(arrays, start=done):
            programs = stepper.programs()
            numbers = stepper.step(number, batch)
            # Waiting for a step only after the next is dispatched keeps the device busy.
            if pending is not None:
                recorder.finish(pending)
            step = number + 1
            compiled = stepper.programs() > programs
            epoch = batches.position(number)[0]
            pending = DispatchedStep(step, numbers, batches.tokens(number), 0.0, compiled, epoch)

            last = asked_to_stop(request.is_set(), step) or step == steps
            # After a signal little time may be left, and saving comes first.
            evaluate = bool(held_out) and (step == steps or due(experiment.eval.every, step))
            save = last or due(experiment.save.every, step)
            act = stepper.due(step)
            if save or evaluate or act or number == done:
                # A checkpoint is only made of a state whose loss is known to be finite.
                recorder.finish(pending)
                pending = None
            if stepper.ended:
                break
            if act:
                stepper.act(step)
            if evaluate:
                stepper.evaluate(step, held_out)
            if save:
                epoch, row = batches.position(step)
                checkpoints.save(step, stepper.state, {"epoch": epoch, "row": row})
                recorder.saved = step
            if save or evaluate or act:
                recorder.mark = time.monotonic()
            if last:
                break


@dataclasses.dataclass
class _Recorder:
    """Waits for dispatched steps, times them, and has their numbers written.

    - done: steps made before this process.
    - saved: the step of the newest checkpoint; None without one.
    - mark: the time from which the next step is timed: when the last step, or work between two steps, ended.
    """

    stepper: AbstractStepper
    done: int
    saved: int | None
    mark: float = dataclasses.field(default_factory=time.monotonic)

    def finish(self, pending: DispatchedStep) -> None:
        """Wait for a step and record it. Raises SboraxError if the run cannot go on."""
        numbers = jax.device_get(pending.numbers)
        moment = time.monotonic()
        dispatched = dataclasses.replace(pending, numbers=numbers, seconds=moment - self.mark)
        self.mark = moment
        if not dispatched.compiled:
            self.stepper.speed.add(dispatched.tokens, dispatched.seconds)
        problem = self.stepper.record(dispatched, first=dispatched.step == self.done + 1)
        if problem is not None:
            fallback = f"checkpoint {self.saved} is kept" if self.saved else "there is no checkpoint yet"
            raise SboraxError(f"step {dispatched.step}: {problem}; {fallback}; lower optimizer.lr or look at the data")


def due(interval: int | None, step: int) -> bool:
    """Whether something that is done every `interval` steps (None: never) is due after `step` steps."""
    return interval is not None and step % interval == 0
