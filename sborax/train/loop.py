"""From an `Experiment` to a run directory: `train`, and the loop that every run and every sweep goes through."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.tree import combine
from sborax.config.codec import encode
from sborax.config.terminal import say
from sborax.data.batches import Batch, Batches
from sborax.data.stream import stream
from sborax.layout.hosts import asked_to_stop, check_alike, gathered, held, is_first, on_first, several
from sborax.layout.sharding import Layout
from sborax.layout.state import Parts, TrainState, parameters
from sborax.records.adapter import PLAN, fingerprint, save_adapter
from sborax.records.best import best_so_far
from sborax.records.checkpoint import Checkpoints, open_checkpoints
from sborax.records.claim import claimed
from sborax.records.disk import CONFIG
from sborax.records.report import Metrics, Progress, Summary
from sborax.records.trace import make_trace
from sborax.train.begin import begin
from sborax.train.experiment import Experiment, save_experiment
from sborax.train.figures import figures
from sborax.train.log import check_logs, open_logs
from sborax.train.prepare import prepare
from sborax.train.read import Echo, preflight, read_data, read_held_out, read_model, silent
from sborax.train.record import Made, Record
from sborax.train.resume import check_config, check_steps, has_computed
from sborax.train.stepper import AbstractStepper, RunStepper
from sborax.train.stop import Stop, stopping

ADAPTER = "adapter"


def train(
    experiment: Experiment, out: str | epath.PathLike, resume: bool = False, echo: Echo = say, profile: bool = False
) -> Summary:
    """Run `experiment` and write the run directory `out`: config, metrics, checkpoints, adapter, summary.

    - resume: continue from the newest whole checkpoint in `out`; on one machine the bits are those of a run that was
      never interrupted. SIGTERM and Ctrl-C save a checkpoint and end the run in good order.
    - profile: write an xprof trace of a few steps to `profile/` of the run directory.

    Raises SboraxError for whatever the user can mend, and for a loss that is not finite (the last checkpoint stays).
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
    """The run directory, held by this process.

    Raises SboraxError if it is in use, or if its config differs in what a resumed run may not change.
    """
    with claimed(run, resume):
        if resume:
            check_config(run, experiment, has_computed(run))
        yield


def _train(
    experiment: Experiment, run: epath.Path, resume: bool, layout: Layout, echo: Echo, profile: bool, stop: Stop
) -> Summary:
    began = time.monotonic()

    # Read the base and the data.
    echo(f"loading {experiment.model} ({experiment.precision})")
    model = read_model(experiment, layout)
    echo(f"attention: {model.module.attention}")
    if several():
        here, everywhere = held(model.params)
        echo(f"weights: {here:,} of {everywhere:,} bytes on this host")
    batches, report = read_data(experiment, model, echo)
    held_out = read_held_out(experiment, model, echo)
    steps = experiment.steps or batches.steps(experiment.epochs or 1.0)

    # Prepare the run: adapters on the base, the optimiser's state, and where both lie.
    prints, total = fingerprint(model.params), parameters(model.params)
    prepared = prepare(experiment, model, steps, run, layout)
    parts = layout.place(begin(prepared, model, batches, run, echo), model.config)
    # A second reference would keep a base alive that the adapters have rewritten.
    del model
    if layout.mesh is not None:
        echo(f"mesh: {layout} of {len(jax.devices())} devices")
    state, shardings = layout.state(prepared.start(parts))

    # Restore what an earlier process has made of it.
    # A run directory has a config before it has anything else.
    on_first(lambda: None if (run / CONFIG).exists() else save_experiment(experiment, run))
    checkpoints = open_checkpoints(run, experiment.save.keep)
    done = 0
    if resume:
        restored = checkpoints.restore(state, echo)
        check_alike("checkpoints", 0 if restored is None else restored[1])
        check_steps(run, 0 if restored is None else restored[1], steps)
        # A changed config replaces that of the run once nothing refuses it any more.
        on_first(lambda: save_experiment(experiment, run))
        if restored is None:
            echo("no checkpoint yet: starting from step 0")
        else:
            state, done = restored
            summary = ending(run, steps)
            if done == steps and summary is not None:
                checkpoints.close()
                echo(f"already finished after step {done:,}: {run}")
                return summary
            parts = parts if prepared.procedure is None else prepared.procedure.replay(done, state, parts)
            echo(f"resuming after step {done:,}")
    elif checkpoints.steps:
        raise SboraxError(f"{run}: holds checkpoints of another run; resume it or choose another directory")

    def write(state: TrainState, parts: Parts, place: epath.Path, **notes: Any) -> None:
        procedure = prepared.procedure
        adapters = procedure.adapters(state, parts) if procedure else combine(state.train["adapters"], parts.frozen)
        # Put together by all processes, written by one.
        adapters, trained_base = gathered((adapters, state.train["base"]))
        about = {"model": experiment.model, "precision": experiment.precision, "quant": experiment.quant, **notes}
        if is_first():
            save_adapter(place, adapters, rules=experiment.rules, base=prints, trained_base=trained_base, about=about)

    # Step.
    progress, metrics = Progress(steps, done, echo), Metrics(run, done, is_first())
    with contextlib.ExitStack() as ends:
        ends.callback(checkpoints.close)
        ends.callback(progress.close)
        logs = open_logs(experiment, run, done, ends) if is_first() else ()
        record = Record(metrics, figures(prepared.model.config, parts, layout.devices), logs)
        data = encode(experiment)["eval"]["data"]
        best = best_so_far(run, data, echo, is_first()) if experiment.save.best else None
        trace = make_trace(run, done, steps) if profile else None
        if trace is not None:
            ends.callback(trace.close)
        stepper = RunStepper(prepared, state, parts, record, progress, layout, shardings, best, trace, write)
        # Its buffers go with the first step.
        del state
        progress.say("compiling")
        loop(stepper, experiment, batches, held_out, checkpoints, steps, done, stop, layout)

    # Write the adapter and the summary.
    made = int(stepper.state.step)
    finished = made == steps
    if finished:
        write(stepper.state, stepper.parts, run / ADAPTER)
    summary = Summary.of(
        metrics, stepper.speed, began, finished, made, parts.count, total, samples=report, devices=layout.devices
    )
    if is_first():
        summary.write(run)
    echo(f"done: {run}" if finished else f"stopped after step {made:,}, saved; --resume goes on from there")
    return summary


def ending(run: epath.Path, steps: int) -> Summary | None:
    """The summary of a run that has made its `steps` and written its adapter; None if something is left to write."""
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
    """Steps `done` to `steps`, or until a signal: data, step, record, act, evaluate, save.

    Raises SboraxError for a loss, gradient or update that is not finite, and in the first step for a dead adapter.
    """
    watch = _Watch(stepper, done, done or None)
    pending, rows = None, layout.rows(experiment.batch_size)
    source = stream(lambda number: batches.part(number, rows), done, steps)
    with stop.in_good_order() as asked, source as arrays:
        for number, batch in enumerate(arrays, start=done):
            programs = stepper.programs()
            numbers = stepper.step(number, batch)
            # Waiting for a step only after the next is dispatched keeps the device busy.
            if pending is not None:
                watch.end(pending)
            now = number + 1
            epoch, row = batches.position(now)
            pending = Made(now, numbers, batches.tokens(number), 0.0, stepper.programs() > programs, epoch)

            last = asked_to_stop(asked.is_set(), now) or now == steps
            evaluate = bool(held_out) and (last or due(experiment.eval.every, now))
            save = last or due(experiment.save.every, now)
            act = stepper.due(now)
            if save or evaluate or act or number == done:
                # A checkpoint is only made of a state whose loss is known to be finite.
                watch.end(pending)
                pending = None
            if act:
                stepper.act(now)
            if evaluate:
                stepper.evaluate(now, held_out)
            if save:
                checkpoints.save(now, stepper.state, {"epoch": epoch, "row": row})
                watch.saved = now
            if save or evaluate or act:
                watch.mark = time.monotonic()
            if last:
                break


@dataclasses.dataclass
class _Watch:
    """Waits for steps and times them.

    done: steps before this process. saved: the step of the newest checkpoint. mark: when the last step ended.
    """

    stepper: AbstractStepper
    done: int
    saved: int | None
    mark: float = dataclasses.field(default_factory=time.monotonic)

    def end(self, pending: Made) -> None:
        """Wait for a step and record it. Raises SboraxError if the run cannot go on."""
        numbers = jax.device_get(pending.numbers)
        now = time.monotonic()
        made = dataclasses.replace(pending, numbers=numbers, seconds=now - self.mark)
        self.mark = now
        if not made.compiled:
            self.stepper.speed.add(made.tokens, made.seconds)
        problem = self.stepper.record(made, first=made.step == self.done + 1)
        if problem is not None:
            kept = f"checkpoint {self.saved} is kept" if self.saved else "there is no checkpoint yet"
            raise SboraxError(f"step {made.step}: {problem}; {kept}; lower optimizer.lr or look at the data")


def due(every: int | None, step: int) -> bool:
    """Whether something done every so many steps is done after this one."""
    return every is not None and step % every == 0
