"""The gain of packing, on the data set alpaca_en_demo under $SBORAX_DATA.

Samples are tokenised by SmolLM2's tokenizer and put into rows of 512 tokens: several samples a row, or one. The number
of useful tokens in a row follows from the lengths. LoRA's step is timed on both kinds of rows in turn.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax

import sborax as sx
from benchmarks.ours import plain_model, random_params
from benchmarks.shapes import SHAPES
from sborax.cli.fetch import smollm2_gguf
from sborax.data.batches import Batch, Rows, arrange, shuffled
from sborax.data.options import Data
from sborax.data.samples import Sample, load_samples
from sborax.layout.state import start, take_apart
from sborax.models.gguf import open_gguf
from sborax.train.experiment import Optimizer
from sborax.train.optimizer import make_optimizer
from sborax.train.step import make_step

LENGTH = 512


def both(samples: Sequence[Sample], length: int = LENGTH) -> dict[str, Rows]:
    """The rows of both kinds, all of `length` tokens, from the same samples."""
    data = {name: Data("", max_length=length, packing=name == "packed", buckets=(length,)) for name in KINDS}
    return {name: arrange(samples, options) for name, options in data.items()}


KINDS = ("packed", "padded")


def useful(rows: Rows) -> float:
    """Mean number of tokens in a row that are not padding."""
    return sum(len(sample.tokens) - 1 for sample in rows.samples) / len(rows.rows)


def tokens_per_second(rows: dict[str, Rows], batch_size: int, steps: int) -> dict[str, float]:
    """Useful tokens a second of the tiny shape's step, for both kinds of rows: the median over steps in turn.

    Ids are taken modulo the small vocabulary.
    """
    model = plain_model(SHAPES["tiny"], remat="cheap")
    params = random_params(model)
    parts = take_apart(*sx.attach(jax.random.key(0), params, [("self_attn|mlp", sx.LoRA(rank=8))]))
    tx = make_optimizer(Optimizer(), steps)
    state, step = start(parts, tx), make_step(model, tx, jax.random.key(1))
    batches = {name: shuffled(kind, batch_size, 1, 0) for name, kind in rows.items()}
    measured: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(steps + 1):
        for name in rows:
            batch = folded(batches[name][number], model.config.vocab_size)
            began = time.perf_counter()
            state, numbers = step(state, parts.frozen, parts.base, batch)
            jax.block_until_ready((state, numbers))
            seconds = time.perf_counter() - began
            # The first step of each compiles, or follows a compilation.
            if number:
                measured[name].append(float((batch["segments"] > 0).sum()) / seconds)
    return {name: statistics.median(rates) for name, rates in measured.items()}


def folded(batch: Batch, vocab: int) -> dict[str, Any]:
    """A batch with ids modulo a smaller vocabulary."""
    return {name: array % vocab if name in ("tokens", "targets") else array for name, array in batch.items()}


def measure(data: str, batch: int, steps: int) -> dict[str, Any]:
    """Useful tokens of packed rows over those of padded rows, a row and a second."""
    tokenizer = open_gguf(smollm2_gguf()).tokenizer()
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    samples, report = load_samples(Data(data, max_length=LENGTH), tokenizer, end, LENGTH)
    rows = both(samples)
    rates = tokens_per_second(rows, batch, steps)
    return {
        "samples": str(report),
        "rows": {name: len(kind.rows) for name, kind in rows.items()},
        "useful_in_a_row": useful(rows["packed"]) / useful(rows["padded"]),
        "useful_in_a_second": rates["packed"] / rates["padded"],
    }
