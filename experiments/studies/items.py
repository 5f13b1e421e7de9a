"""Answer losses of held-out items, one by one."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

import sborax as sx
from experiments.studies.study import Held
from sborax.cli.targets import Target
from sborax.data.batches import Batch, Rows, arrange, in_order
from sborax.data.samples import Sample, load_samples
from sborax.layout.state import flatten
from sborax.models import LanguageModel
from sborax.records.eval_losses import sample_losses
from sborax.train.read import end_token
from sborax.train.step import make_evaluation

AT_ONCE = 16
"""Items of a batch."""


def held_out(held: Held, model: LanguageModel) -> list[Sample]:
    """The samples that `held` describes. Raises SboraxError if there are too few."""
    samples, _ = load_samples(held.data, model.tokenizer, end_token(model), model.config.context)
    left = samples[held.skip :]
    if len(left) < held.items:
        raise sx.SboraxError(
            f"{held.data.label()}: {len(samples)} samples are fewer than {held.skip} + {held.items} items"
        )
    return [left[place * len(left) // held.items] for place in range(held.items)]


def digests(samples: list[Sample]) -> str:
    """Eight digits for each item, one after the other: the same digits are the same tokens and answer."""
    return "".join(
        hashlib.sha256(sample.tokens.tobytes() + sample.counts.tobytes()).hexdigest()[:8] for sample in samples
    )


def batches_of(samples: list[Sample], held: Held) -> list[Batch]:
    """The items in order, in batches."""
    rows: Rows = arrange(samples, dataclasses.replace(held.data, packing=False))
    return in_order(rows, AT_ONCE)


def scorer(model: LanguageModel) -> Callable[[Target, list[Batch]], np.ndarray]:
    """A function that gives the loss of every item in nats a token, for any adapter of one structure over the model."""
    measure = make_evaluation(dataclasses.replace(model, params={}))

    def score(target: Target, batches: list[Batch]) -> np.ndarray:
        train, frozen = sx.split(target.adapters or {})
        base, losses = flatten(target.params), []
        for batch in batches:
            terms = measure({"adapters": train, "base": {}}, frozen, base, batch)[2]
            losses += sample_losses(batch, np.asarray(terms))
        return np.array([loss.loss / loss.tokens for loss in losses])

    return score
