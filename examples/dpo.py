"""Direct preference optimisation of LoRA (arXiv:2305.18290): a custom loss in a custom loop.

    python examples/dpo.py MODEL pairs.jsonl --out runs/dpo

A line of `pairs.jsonl` has `prompt`, `chosen` and `rejected`. The base without its adapter is the reference, so there
is no second model in memory.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import sborax as sx
from sborax.config.documents import parse

BETA = 0.1


@dataclasses.dataclass(frozen=True)
class DPO(sx.AbstractLoss):
    """-log sigmoid(beta (r(chosen) - r(rejected))), r(y) = log p(y) - log p_base(y), the mean over pairs.

    Rows 2i and 2i + 1 of a batch are the chosen and the rejected answer of pair i. [arXiv:2305.18290]

    - beta: how closely the model stays to the base; the paper uses 0.1.
    """

    beta: float = BETA

    def __call__(self, outputs: sx.Outputs) -> tuple[Float[Array, ""], Int[Array, ""]]:
        ratios = outputs.log_probs() - outputs.base_log_probs()
        rewards = jnp.sum(jnp.where(outputs.batch["counts"], ratios, jnp.float32(0)), axis=1)
        margins = rewards[0::2] - rewards[1::2]
        return -jnp.sum(jax.nn.log_sigmoid(jnp.float32(self.beta) * margins)), jnp.int32(len(margins))


def experiment(model: str, pairs: Path, steps: int, lr: float, length: int) -> sx.Experiment:
    """LoRA of rank 16 on every layer. There are two rows for each pair."""
    lines = [parse(line, str(pairs)) for line in pairs.read_bytes().splitlines()]
    records = [{"prompt": line["prompt"], "answer": line[name]} for line in lines for name in ("chosen", "rejected")]
    return sx.Experiment(
        model,
        # Truncate, since a dropped answer would leave half a pair.
        sx.Data(records, template="{prompt}", answer="{answer}", max_length=length, overlong="truncate"),
        (("self_attn|mlp", sx.LoRA(rank=16)),),
        sx.Optimizer(lr=lr, warmup=0.1),
        loss=DPO(),
        steps=steps,
        batch_size=8,
    )


def pairs_in_order(batches: sx.Batches, steps: range, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of whole pairs, in an order that depends on the seed and the number of the step alone."""
    count, size = len(batches.rows.rows) // 2, batches.batch_size // 2
    for step in steps:
        epoch, place = divmod(step * size, count)
        order = np.concatenate([np.random.default_rng((seed, epoch + i)).permutation(count) for i in (0, 1)]).tolist()
        rows = [2 * pair + side for pair in order[place : place + size] for side in (0, 1)]
        yield batches.of(rows)


def train(experiment: sx.Experiment, out: Path) -> list[float]:
    """Train, and write adapter and checkpoints to `out`. A second call resumes. Returns the losses."""
    layout = sx.Layout.of(experiment.mesh, experiment.batch_size)
    losses = []
    with layout.context():
        model = sx.read_model(experiment, layout)
        batches, _ = sx.read_data(experiment, model, print)
        prepared = sx.prepare(experiment, model, experiment.steps, layout=layout)
        parts = layout.place(prepared.adapt(model.params), model.config)
        state, shardings = layout.state(prepared.start(parts))
        step = prepared.make_step(shardings)
        checkpoints = sx.open_checkpoints(out, keep=1)
        state, done = checkpoints.restore(state, print) or (state, 0)
        for number, batch in enumerate(
            pairs_in_order(batches, range(done, experiment.steps), experiment.seed_data), start=done + 1
        ):
            state, numbers = step(state, parts.frozen, parts.base, layout.batch(batch))
            losses.append(float(numbers["loss"]))
            print(f"step {number}: loss {losses[-1]:.4f}")
            if number % 50 == 0 or number == experiment.steps:
                checkpoints.save(number, state, {})
        checkpoints.close()
    adapters = sx.combine(state.train["adapters"], parts.frozen)
    sx.save_adapter(out / "adapter", adapters, rules=experiment.rules, about={"model": experiment.model})
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--length", type=int, default=512, help="longest prompt with its answer, in tokens")
    arguments = parser.parse_args()
    settings = experiment(arguments.model, arguments.pairs, arguments.steps, arguments.lr, arguments.length)
    train(settings, arguments.out)


if __name__ == "__main__":
    main()
