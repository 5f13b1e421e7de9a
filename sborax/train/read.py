"""What a run reads: the base model, its data, and the held-out data. And what can be checked before."""

from collections.abc import Callable

import numpy as np

from sborax.adapters.paths import as_rules, has_policy, plan
from sborax.data.batches import Batches, arrange, in_order, shuffled
from sborax.data.options import Data
from sborax.data.samples import Sample, check_ids, load_samples
from sborax.data.source import check_named
from sborax.layout.sharding import Layout
from sborax.models.language_model import LanguageModel, abstract
from sborax.models.load import load_config, load_model
from sborax.train.base import rewritten
from sborax.train.experiment import Experiment
from sborax.train.hints import promised
from sborax.train.optimizer import make_optimizer

Echo = Callable[[str], None]


def silent(text: str) -> None:
    """An `Echo` for processes, and for members of a sweep, that leave speaking to the first."""


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
    """The base of a run: quantised where it asks for that, but for kernels from which a method starts."""
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
    """The batches of a run, and a line on what became of its records."""
    samples, report = _samples(experiment.data, model, echo, "data")
    rows = arrange(samples, experiment.data)
    return shuffled(rows, experiment.batch_size, experiment.accumulate, experiment.seed_data), report


def read_held_out(experiment: Experiment, model: LanguageModel, echo: Echo) -> list[dict[str, np.ndarray]]:
    """The batches of `eval.data`; none without it."""
    if experiment.eval.data is None:
        return []
    samples, _ = _samples(experiment.eval.data, model, echo, "held-out data")
    return in_order(arrange(samples, experiment.eval.data), experiment.batch_size)
