"""Answer losses of held-out items, one by one."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import sborax as sx
from experiments.studies.study import Held
from sborax.cli.targets import Target
from sborax.data.batches import Batch, Rows, arrange, in_order
from sborax.data.samples import Sample, load_samples
from sborax.layout.state import flatten
from sborax.models import LanguageModel
from sborax.train.outputs import Outputs
from sborax.train.read import end_token
from sborax.train.step import sums

AT_ONCE = 16
"""Items of a batch."""


@dataclasses.dataclass(frozen=True)
class ItemLosses(sx.AbstractLoss):
    """The loss of every row, and its tokens that count."""

    def __call__(self, outputs: Outputs) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
        counts = outputs.batch["counts"].astype(jnp.float32)
        return -jnp.sum(outputs.log_probs() * counts, axis=1), jnp.sum(counts, axis=1)


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
    bare = dataclasses.replace(model, params={})

    @jax.jit
    def measure(train: Any, frozen: Any, base: Any, batch: dict[str, Array]) -> tuple[Array, Array]:
        total = sums(bare, train, frozen, base, batch, None, ItemLosses())
        return total.losses["loss"], total.items

    def score(target: Target, batches: list[Batch]) -> np.ndarray:
        train, frozen = sx.split(target.adapters or {})
        values = []
        for batch in batches:
            arrays = jax.tree.map(jnp.asarray, batch)
            losses, counts = measure({"adapters": train, "base": {}}, frozen, flatten(target.params), arrays)
            filled = np.asarray(counts) > 0
            values.append(np.asarray(losses)[filled] / np.asarray(counts)[filled])
        return np.concatenate(values)

    return score
