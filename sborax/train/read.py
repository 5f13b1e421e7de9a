"""Reads the base, the data and the held-out data of a run, and checks beforehand what can be checked."""

import numpy as np

from sborax.adapters.paths import as_rules, has_policy, plan
from sborax.data.batches import Batches, Rows, arrange, in_order, shuffled
from sborax.data.options import Data
from sborax.data.samples import Sample, check_ids, load_samples
from sborax.data.source import check_named
from sborax.layout.sharding import Layout
from sborax.models.decoder import check_capacity
from sborax.models.language_model import LanguageModel, abstract
from sborax.models.load import load_config, load_model
from sborax.train.base import rewritten
from sborax.train.experiment import Experiment
from sborax.train.hints import Echo, promised
from sborax.train.optimizer import make_optimizer

HELD_OUT = "held-out data"


def silent(text: str) -> None:
    """An `Echo` that prints nothing: of all processes, and members of a sweep, the first alone prints."""


def preflight(experiment: Experiment) -> None:
    """Check what needs neither weights nor records: the model's config, rules, ranks, and that the data exists.

    Raises SboraxError as planning, `load_config` and `sborax.data.source.find` do.
    """
    make_optimizer(experiment.optimizer, 1)
    for data in (experiment.data, experiment.eval.data):
        if data is not None:
            check_named(data.name, data.split)
    config = load_config(experiment.model)
    check_capacity(config, experiment.expert_capacity)
    params = abstract(config, experiment.precision)
    rules = as_rules(experiment.rules)
    # A rank policy may read the weights.
    if not any(rule.method is not None and has_policy(rule.method) for rule in rules):
        plan(params, rules, hints=promised(params))


def end_token(model: LanguageModel) -> int | None:
    """The token that ends a text: that of the tokenizer, else the first of the model's config; None for none."""
    end = model.tokenizer.eos_token_id if model.tokenizer is not None else None
    return model.config.eos_token_id[0] if end is None and model.config.eos_token_id else end


def _samples(data: Data, model: LanguageModel, echo: Echo, label: str) -> tuple[list[Sample], str]:
    samples, report = load_samples(data, model.tokenizer, end_token(model), model.config.context)
    check_ids(data.label(), samples, model.tokenizer, model.config.vocab_size)
    echo(f"{label} {data.label()}: {report}")
    return samples, str(report)


def read_model(experiment: Experiment, layout: Layout = Layout()) -> LanguageModel:
    """The base of a run, quantised if it asks for that, except for kernels that a method rewrites."""
    return load_model(
        experiment.model,
        experiment.precision,
        remat=experiment.remat,
        quant=experiment.quant,
        keep=rewritten(as_rules(experiment.rules)),
        attention=experiment.attention,
        expert_capacity=experiment.expert_capacity,
        shardings=None if layout.mesh is None else layout.of_params,
    )


def read_rows(data: Data, model: LanguageModel, echo: Echo, what: str = "data") -> tuple[Rows, str]:
    """The rows of a data set, and a line that tells how many of its records are used."""
    samples, report = _samples(data, model, echo, what)
    return arrange(samples, data), report


def read_data(experiment: Experiment, model: LanguageModel, echo: Echo) -> tuple[Batches, str]:
    """The batches of a run, and a line with the number of records that are used."""
    rows, report = read_rows(experiment.data, model, echo)
    return shuffled(rows, experiment.batch_size, experiment.accumulate, experiment.seed_data), report


def length_of(experiment: Experiment, batches: Batches) -> int:
    """The number of steps of a run."""
    return experiment.steps or batches.steps(experiment.epochs or 1.0)


def read_held_out_rows(experiment: Experiment, model: LanguageModel, echo: Echo) -> Rows:
    """The rows of `eval.data`; without it there are none."""
    data = experiment.eval.data
    return Rows([], (), ()) if data is None else read_rows(data, model, echo, HELD_OUT)[0]


def read_held_out(experiment: Experiment, model: LanguageModel, echo: Echo) -> list[dict[str, np.ndarray]]:
    """The batches of `eval.data`; an empty list without it."""
    return in_order(read_held_out_rows(experiment, model, echo), experiment.batch_size)
