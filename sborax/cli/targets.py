"""Loads the target of a command: a model or a run."""

import dataclasses
from typing import Any

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.paths import as_rules
from sborax.adapters.tree import rebase
from sborax.config.documents import read_object
from sborax.config.terminal import say
from sborax.interop.peft import load_peft
from sborax.models import LanguageModel, load_model
from sborax.records.adapter import PLAN, load_adapter
from sborax.records.best import BEST
from sborax.records.checkpoint import newest
from sborax.records.disk import ADAPTER, CONFIG
from sborax.records.report import Summary
from sborax.train.base import quantise_base, rewritten
from sborax.train.experiment import Experiment, load_experiment


@dataclasses.dataclass(frozen=True)
class Target:
    """A model, with the parameters and adapters to use.

    - model: as loaded; `model.params` is the base without the adapter.
    - params: the base as the adapters need it, which some methods rewrite.
    - adapters: None for a model without an adapter.
    - experiment: of the run; None for a model.
    """

    model: LanguageModel
    params: Any
    adapters: Any
    experiment: Experiment | None


def is_experiment(target: str) -> bool:
    """Whether `target` is a Python file, a run's config, or the directory of a run."""
    path = epath.Path(target)
    return path.suffix in (".py", ".json") or is_run(target)


def is_run(target: str) -> bool:
    """Whether `target` is a run directory, that is, its `config.json` is that of an experiment."""
    config = epath.Path(target) / CONFIG
    if not config.exists():
        return False
    try:
        return {"model", "data"} <= read_object(config).keys()
    except SboraxError:
        return False


def is_best(target: str) -> bool:
    """Whether `target` is `best/` of a run."""
    path = epath.Path(target)
    return path.name == BEST and (path / PLAN).exists() and is_run(str(path.parent))


def find_run(run: str) -> tuple[Experiment, epath.Path]:
    """The experiment of a run, and its adapter directory.

    - run: a run directory, or `best/` of one.

    Raises SboraxError for another directory, and for a run that has not ended.
    """
    adapter = epath.Path(run) / ADAPTER
    if is_best(run):
        adapter, run = epath.Path(run), str(epath.Path(run).parent)
    if not is_run(run):
        raise SboraxError(f"{run}: not a run; give the directory that `sborax train` wrote")
    experiment = load_experiment(run)
    if not (adapter / PLAN).exists():
        raise SboraxError(
            f"{run}: no {ADAPTER}/ in it, the run has not ended; `sborax train {run} --out {run} --resume`"
        )
    return experiment, adapter


def has_gone_on(adapter: epath.Path) -> str | None:
    """A note if a run was continued after it wrote its adapter, and has not ended again; else None.

    - adapter: `adapter/` of the run; for `best/`, which every step may replace, the result is None.
    """
    run, adapter_step = adapter.parent, read_object(adapter / PLAN).get("step")
    if adapter.name != ADAPTER or type(adapter_step) is not int:
        return None
    summary = Summary.read(run)
    step = max(newest(run), 0 if summary is None else summary.steps)
    if step <= adapter_step:
        return None
    return f"{run}: was continued to step {step:,} and has not ended; its adapter is that of step {adapter_step:,}"


def load_run(run: str) -> Target:
    """The base model of a run with the last adapter, or, for RUN_DIR/best, with the best one.

    Raises SboraxError as `find_run` does.
    """
    experiment, adapter = find_run(run)
    # Kernels that a method rewrites are loaded dense, rewritten again, then quantised.
    keep = rewritten(as_rules(experiment.rules))
    model = load_model(experiment.model, experiment.precision, quant=experiment.quant, keep=keep)
    return load_onto(model, experiment, adapter)


def load_onto(model: LanguageModel, experiment: Experiment, adapter: epath.Path) -> Target:
    """The adapter of a run on its base. Prints a line if the run has gone on since.

    - model: with the kernels dense that the run rewrites.
    - adapter: the directory that `find_run` gives.
    """
    if note := has_gone_on(adapter):
        say(note)
    params, adapters = load_adapter(adapter, model.params)
    params = quantise_base(params, experiment.quant)
    return Target(model, params, rebase(params, adapters), experiment)


def load_target(target: str, adapter: str | None = None) -> Target:
    """Load a run, or a model with or without a PEFT adapter.

    - target: a run directory or `best/` of one, a Hugging Face directory, a hub id, or a `.gguf` file.
    - adapter: a PEFT adapter directory; None for none.

    Raises SboraxError for another target, and for an adapter on top of a run.
    """
    if is_run(target) or is_best(target):
        if adapter is not None:
            raise SboraxError(f"--adapter {adapter}: {target} is a run and has its own; give its base model instead")
        return load_run(target)
    model = load_model(target)
    if adapter is None:
        return Target(model, model.params, None, None)
    params, adapters = load_peft(adapter, model)
    return Target(model, params, adapters, None)
