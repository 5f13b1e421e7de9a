"""From an `Experiment` to a run directory."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.paths import Plan, as_rules, has_policy, plan
from sborax.adapters.tree import combine, nest, nodes
from sborax.config.codec import encode
from sborax.config.terminal import say
from sborax.data.batches import Batches, arrange, in_order, shuffled
from sborax.data.options import Data
from sborax.data.samples import Sample, check_ids, load_samples
from sborax.data.source import check_named
from sborax.layout.hosts import check_alike, gathered, held, is_first, on_first, several
from sborax.layout.sharding import Layout
from sborax.layout.state import Parts, TrainState, parameters, start, take_apart
from sborax.models.language_model import LanguageModel, abstract
from sborax.models.load import load_config, load_model
from sborax.procedures import Run
from sborax.records.adapter import PLAN, fingerprint, read_adapter, save_adapter
from sborax.records.best import best_so_far
from sborax.records.checkpoint import open_checkpoints
from sborax.records.claim import START, claimed
from sborax.records.report import Metrics, Progress, Summary, describe
from sborax.records.trace import make_trace
from sborax.train.base import adapt, rewritten
from sborax.train.experiment import Experiment, save_experiment
from sborax.train.figures import figures
from sborax.train.hints import gradients, promised
from sborax.train.log import check_logs, open_logs
from sborax.train.optimizer import halves, make_optimizer
from sborax.train.resume import check_config, has_computed
from sborax.train.steps import Loop
from sborax.train.stop import Stop, stopping
from sborax.train.turns import turns_of

ADAPTER = "adapter"

Echo = Callable[[str], None]


def train(
    experiment: Experiment, out: str | epath.PathLike, resume: bool = False, echo: Echo = say, profile: bool = False
) -> Summary:
    """Run `experiment` and write the run directory `out`: config, metrics, checkpoints, adapter, summary.

    resume: continue from the newest whole checkpoint in `out`; on one machine the bits are those of a run that was
        never interrupted. SIGTERM and Ctrl-C save a checkpoint and end the run in good order.
    profile: write an xprof trace of a few steps to `profile/` of the run directory.
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
                return _train(experiment, run, resume, layout, echo if is_first() else _silent, profile, stop)


@contextlib.contextmanager
def claim(run: epath.Path, experiment: Experiment, resume: bool) -> Iterator[None]:
    """The run directory, held by this process.

    Raises SboraxError if it is in use, or if its config differs in what a resumed run may not change.
    """
    with claimed(run, resume):
        if resume:
            check_config(run, experiment, has_computed(run))
        yield


def _silent(text: str) -> None:
    """What the other processes say."""


def _train(
    experiment: Experiment, run: epath.Path, resume: bool, layout: Layout, echo: Echo, profile: bool, stop: Stop
) -> Summary:
    began = time.monotonic()
    echo(f"loading {experiment.model} ({experiment.precision})")
    model = read_model(experiment, layout)
    echo(f"attention: {model.module.attention}")
    if several():
        own, together = held(model.params)
        echo(f"weights: {own:,} of {together:,} bytes on this host")
    batches, report = read_data(experiment, model, echo)
    held_out = read_held_out(experiment, model, echo)
    on_first(lambda: save_experiment(experiment, run))
    steps = experiment.steps or batches.steps(experiment.epochs or 1.0)
    kv_heads = model.config.num_key_value_heads
    model, parts, base_prints, total, chosen = set_up(experiment, model, batches, run, echo)
    turns = turns_of(experiment, Run(chosen, steps, kv_heads), run, layout)
    parts = parts if turns is None else turns.begin(parts)
    tx = make_optimizer(experiment.optimizer, steps, None if turns is None else turns.watch())
    parts = layout.place(parts, model.config)
    if layout.mesh is not None:
        echo(f"mesh: {layout} of {len(jax.devices())} devices")
    state, shardings = layout.state(start(parts, tx))
    checkpoints = open_checkpoints(run, experiment.save.keep)
    done = 0
    if resume:
        restored = checkpoints.restore(state, echo)
        check_alike("checkpoints", 0 if restored is None else restored[1])
        if restored is None:
            echo("no checkpoint yet: starting from step 0")
        else:
            state, done = restored
            if done > steps:
                raise SboraxError(f"{run}: has made {done:,} steps, and is to make {steps:,}; give it {done:,} or more")
            summary = ending(run, steps)
            if done == steps and summary is not None:
                checkpoints.close()
                echo(f"already finished after step {done:,}: {run}")
                return summary
            parts = parts if turns is None else turns.resume(done, state, parts)
            echo(f"resuming after step {done:,}")
    elif checkpoints.steps:
        raise SboraxError(f"{run}: holds checkpoints of another run; resume it or choose another directory")
    progress = Progress(steps, done, echo)
    metrics = Metrics(run, done, is_first())
    loop = Loop(experiment, model, parts, batches, held_out, checkpoints, metrics, steps, done, progress)
    loop.turns, loop.layout, loop.shardings, loop.stop = turns, layout, shardings, stop
    loop.figures = figures(model.config, parts, layout.devices)

    def write(state: TrainState, parts: Parts, place: epath.Path, **notes: Any) -> None:
        adapters = combine(state.train["adapters"], parts.frozen) if turns is None else turns.whole(state, parts)
        # Put together by all processes, written by one.
        adapters, trained_base = gathered((adapters, state.train["base"]))
        about = {"model": experiment.model, "precision": experiment.precision, "quant": experiment.quant, **notes}
        if is_first():
            save_adapter(
                place, adapters, rules=experiment.rules, base=base_prints, trained_base=trained_base, about=about
            )

    loop.write = write
    with contextlib.ExitStack() as ends:
        ends.callback(checkpoints.close)
        ends.callback(progress.close)
        if is_first():
            loop.logs = open_logs(experiment, run, done, ends)
        if experiment.save.best:
            loop.best = best_so_far(run, encode(experiment)["eval"]["data"], echo, is_first())
        if profile:
            loop.trace = make_trace(run, done, steps)
            ends.callback(loop.trace.close)
        state = loop.run(state, tx)
    done = int(state.step)
    if done == steps:
        write(state, loop.parts, run / ADAPTER)
    summary = Summary.of(
        metrics, loop.speed, began, done == steps, done, parts.count, total, samples=report, devices=layout.devices
    )
    if is_first():
        summary.write(run)
    if done == steps:
        echo(f"done: {run}")
    else:
        echo(f"stopped after step {summary.steps:,}, saved; --resume goes on from there")
    return summary


def ending(run: epath.Path, steps: int) -> Summary | None:
    """The summary of a run that has made its `steps` and written its adapter; None if something is left to write."""
    summary = Summary.read(run)
    whole = summary is not None and summary.finished and summary.steps == steps and (run / ADAPTER / PLAN).exists()
    return summary if whole else None


def preflight(experiment: Experiment) -> None:
    """Check what needs neither weights nor records: the model's config, rules and ranks, and where the data is.

    Raises SboraxError as planning, `load_config` and `sborax.data.source.find` do.
    """
    make_optimizer(experiment.optimizer, 1)
    for data in (experiment.data, experiment.eval.data):
        if data is not None:
            check_named(data.name, data.split)
    params = abstract(load_config(experiment.model), experiment.precision)
    rules = as_rules(experiment.rules)
    # A rank policy may read the weights.
    if not any(rule.method is not None and has_policy(rule.method) for rule in rules):
        plan(params, rules, hints=promised(params))


def end_token(model: LanguageModel) -> int | None:
    """The token that ends a text: the tokenizer's, else the model's first."""
    end = model.tokenizer.eos_token_id if model.tokenizer is not None else None
    return model.config.eos_token_id[0] if end is None and model.config.eos_token_id else end


def _samples(data: Data, model: LanguageModel, echo: Echo, what: str) -> tuple[list[Sample], str]:
    samples, report = load_samples(data, model.tokenizer, end_token(model), model.config.context)
    check_ids(data.label(), samples, model.tokenizer, model.config.vocab_size)
    echo(f"{what} {data.label()}: {report}")
    return samples, str(report)


def read_model(experiment: Experiment, layout: Layout = Layout()) -> LanguageModel:
    """The base of a run as it is read: quantised, but for kernels that a method takes its start from."""
    return load_model(
        experiment.model,
        experiment.precision,
        remat=experiment.remat,
        quant=experiment.quant,
        keep=rewritten(as_rules(experiment.rules)),
        attention=experiment.attention,
        shardings=None if layout.mesh is None else layout.of_params,
    )


def read_data(experiment: Experiment, model: LanguageModel, echo: Echo) -> tuple[Batches, str]:
    """The batches of a run, and what became of its records."""
    samples, report = _samples(experiment.data, model, echo, "data")
    rows = arrange(samples, experiment.data)
    return shuffled(rows, experiment.batch_size, experiment.accumulate, experiment.seed_data), report


def read_held_out(experiment: Experiment, model: LanguageModel, echo: Echo) -> list[dict[str, np.ndarray]]:
    """The batches on which `eval.data` measures the loss; none without it."""
    if experiment.eval.data is None:
        return []
    samples, _ = _samples(experiment.eval.data, model, echo, "held-out data")
    return in_order(arrange(samples, experiment.eval.data), experiment.batch_size)


def set_up(
    experiment: Experiment, model: LanguageModel, batches: Batches, run: epath.Path, echo: Echo
) -> tuple[LanguageModel, Parts, dict[str, str], int, Plan]:
    """The model without its parameters, these and the adapters taken apart, the base's fingerprint, size and plan."""
    chosen = plan(model.params, experiment.rules, hints=promised(model.params))
    for line in ["adapting:"] * bool(chosen.sites) + describe(chosen):
        echo(line)
    prints, total = fingerprint(model.params), parameters(model.params)
    begun, told = {}, sorted(site.path for site in chosen.sites if site.method.needs)
    if told and (run / START / PLAN).exists():
        # Made anew they might differ in the last bit, and singular vectors then in all of them.
        begun = nodes(read_adapter(run / START).adapters)
    if told and not begun and several():
        raise SboraxError(
            f"{told[0]}: starts from gradients, which one process computes; begin the run on one, and --resume on all"
        )
    hint = gradients(model, chosen, batches, experiment.hint_batches, echo) if told and not begun else None
    key = jax.random.key(experiment.seed_adapter)
    params, adapters = adapt(key, model.params, chosen, experiment.quant, hint, begun)
    if hint is not None:
        save_adapter(run / START, nest({path: nodes(adapters)[path] for path in told}))
    model.check_adapters(adapters)
    parts = take_apart(params, adapters, experiment.train_base, experiment.train_also, halves(experiment.optimizer))
    echo(f"trainable: {parts.count:,} parameters, {100 * parts.count / total:.3f} % of {total:,}")
    # The step holds what it needs; a second reference would keep a rewritten or trained base alive.
    return dataclasses.replace(model, params={}), parts, prints, total, chosen
