"""What packing is worth: python -m benchmarks.packing (needs the data set alpaca_en_demo under $SBORAX_DATA)

Instructions and answers as SmolLM2's tokenizer cuts them, in rows of 512: several samples in a row, or one in each.
Prints the useful tokens in a row, a matter of lengths alone, and times LoRA's step on both kinds of rows in turn.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sborax as sx
from benchmarks.shapes import EPS, SHAPES
from sborax.data.batches import Batch, Rows, arrange, shuffled
from sborax.data.options import Data
from sborax.data.samples import Sample, load_samples
from sborax.fetch import smollm2_gguf
from sborax.models import LanguageModel, Llama, LlamaConfig
from sborax.models.gguf import open_gguf
from sborax.train.experiment import Optimizer
from sborax.train.optimizer import make_optimizer
from sborax.train.state import start, take_apart
from sborax.train.step import make_step

LENGTH = 512


def both(samples: Sequence[Sample], length: int = LENGTH) -> dict[str, Rows]:
    """The rows of the same samples, all of `length` tokens."""
    data = {name: Data("", max_length=length, packing=name == "packed", buckets=(length,)) for name in KINDS}
    return {name: arrange(samples, own) for name, own in data.items()}


KINDS = ("packed", "padded")


def useful(rows: Rows) -> float:
    """Mean tokens of a row that are no padding."""
    return sum(len(sample.tokens) - 1 for sample in rows.samples) / len(rows.rows)


def tokens_per_second(rows: dict[str, Rows], batch_size: int, steps: int) -> dict[str, float]:
    """Median over steps, taken in turn, of the tiny shape's step; ids are folded into its vocabulary."""
    config = LlamaConfig(**SHAPES["tiny"], rms_norm_eps=EPS, bos_token_id=1, eos_token_id=(2,))
    model = LanguageModel(Llama(config, remat="cheap"), {}, config, None)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape), leaf.dtype), model.abstract()
    )
    parts = take_apart(*sx.attach(jax.random.key(0), params, [("self_attn|mlp", sx.LoRA(rank=8))]))
    tx = make_optimizer(Optimizer(), steps)
    state, step = start(parts, tx), make_step(model, tx, jax.random.key(1))
    batches = {name: shuffled(own, batch_size, 1, 0) for name, own in rows.items()}
    found: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(steps + 1):
        for name in rows:
            batch = folded(batches[name][number], config.vocab_size)
            began = time.perf_counter()
            state, numbers = step(state, parts.frozen, parts.base, batch)
            jax.block_until_ready((state, numbers))
            seconds = time.perf_counter() - began
            # The first of each compiles, or follows a compilation.
            if number:
                found[name].append(float((batch["segments"] > 0).sum()) / seconds)
    return {name: statistics.median(rates) for name, rates in found.items()}


def folded(batch: Batch, vocab: int) -> dict[str, Any]:
    """A batch whose ids a smaller vocabulary has."""
    return {name: array % vocab if name in ("tokens", "targets") else array for name, array in batch.items()}


def main() -> None:
    """Count and time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="alpaca_en_demo", help="a file, or a name under $SBORAX_DATA")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    tokenizer = open_gguf(smollm2_gguf()).tokenizer()
    samples, report = load_samples(Data(args.data, max_length=LENGTH), tokenizer, tokenizer.eos_token_id, LENGTH)
    rows = both(samples)
    print(report)
    for name, own in rows.items():
        print(f"{name}: {len(own.rows):,} rows of {LENGTH}, {useful(own):.1f} useful tokens in a row")
    print(f"useful tokens in a row, packed over padded: {useful(rows['packed']) / useful(rows['padded']):.2f}")
    rates = tokens_per_second(rows, args.batch, args.steps)
    print(f"useful tokens a second, packed over padded: {rates['packed'] / rates['padded']:.2f}")


if __name__ == "__main__":
    main()
