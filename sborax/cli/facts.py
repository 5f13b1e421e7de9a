"""The facts of a run for a model card: method, data, training and metrics, read from the run's files."""

from typing import Any

from sborax.adapters.core import AbstractComposite, AbstractMethod
from sborax.adapters.paths import as_rules
from sborax.adapters.vectors import by_module
from sborax.cli.targets import find_run, has_gone_on, is_best
from sborax.config.codec import LiveObject
from sborax.config.documents import read_object
from sborax.data.options import Data
from sborax.evaluate.run import in_words, read_scores
from sborax.records.adapter import read_adapter
from sborax.records.disk import SCORE_FOLDER
from sborax.records.report import SUMMARY, method_line
from sborax.train.experiment import Experiment
from sborax.train.optimizer import AbstractOptimizer


def methods(experiment: Experiment) -> list[str]:
    """The names of the methods of an experiment's rules, including those inside sums and chains."""
    names: list[str] = []
    for rule in as_rules(experiment.rules):
        names += _names(rule.method) if rule.method is not None else []
    return list(dict.fromkeys(names))


def _names(method: AbstractMethod) -> list[str]:
    if isinstance(method, AbstractComposite):
        return [name for part in method.members for name in _names(part)]
    return [type(method).__name__]


def facts(run: str) -> dict[str, str]:
    """The lines of a card, by title. Raises SboraxError as `find_run` does."""
    experiment, adapter = find_run(run)
    lines = {"Data": _data(experiment.data)}
    if experiment.eval.data is not None:
        lines["Held-out data"] = _data(experiment.eval.data)
    rules = "; ".join(
        f"`{rule.pattern}`: {'left alone' if rule.method is None else method_line(rule.method)}"
        for rule in as_rules(experiment.rules)
    )
    lines["Rules"] = rules or "none, the base itself was trained"
    lines["Training"] = _training(experiment)
    summary = adapter.parent / SUMMARY
    if is_best(run):
        about = read_adapter(adapter).about
        lines["Metrics"] = (
            f"held-out loss {about['eval_loss']:.4f}, the lowest of the run, after step {about['step']:,}."
        )
    elif summary.exists() and has_gone_on(adapter) is None:
        lines["Metrics"] = _metrics(read_object(summary))
    if not is_best(run):
        lines |= {
            f"Score on {score['task']}": f"{in_words(score)}." for score in read_scores(adapter.parent / SCORE_FOLDER)
        }
    return lines


def _data(data: Data) -> str:
    limit = f", the first {data.limit:,} samples" if data.limit is not None else ""
    return f"`{data.name}`, split {data.split}{limit}, template {data.template!r}, loss on {data.loss_on}."


def _training(experiment: Experiment) -> str:
    optimizer = experiment.optimizer
    assert isinstance(optimizer, AbstractOptimizer | LiveObject)
    length = f"{experiment.steps:,} steps" if experiment.steps is not None else f"{experiment.epochs} epochs"
    rows = experiment.batch_size * experiment.accumulate
    beside = [*experiment.train_also]
    modules = by_module(experiment.train_tokens)
    beside += [f"the vectors of {len(tokens)} tokens in {module}" for module, tokens in modules.items()]
    also = f", {', '.join(beside)} trained beside the adapters" if beside else ""
    quant = f" on a base in {experiment.quant}" if experiment.quant else ""
    return (
        f"{length} of {rows} rows, {optimizer.label()}, {experiment.precision}"
        f"{quant}{also}, seeds {experiment.seed_data} and {experiment.seed_adapter}."
    )


def _metrics(summary: dict[str, Any]) -> str:
    parts = [f"{summary['trainable_parameters']:,} trained parameters"]
    for field, title in (("last_loss", "training loss of the last step"), ("eval_loss", "held-out loss at the end")):
        if summary.get(field) is not None:
            parts.append(f"{title} {summary[field]:.4f}")
    return f"{', '.join(parts)}."
