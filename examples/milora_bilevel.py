"""MiLoRA's alternating optimisation (arXiv:2410.18035, appendix): its router's activation learns from held-out data.

    python examples/milora_bilevel.py MODEL train.jsonl held_out.jsonl --out runs/bilevel

    omega <- omega - lr Adam(dL_train / d omega),    theta <- theta - lr' Adam(dL_held-out / d theta),    in turn

Theta are the coefficients of the rational functions in the routers, 12 for each; omega is everything else that is
trained. As in DARTS of first order (arXiv:1806.09055), each step takes the other half as it is. The lines of both files
have `instruction` and `output`.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from jaxtyping import PyTree

import sborax as sx

COEFFICIENTS = ("numerator", "denominator")
LR, THETA_LR = 1e-4, 1e-6
"""The paper's rates of omega and theta."""


def halves(train: PyTree) -> PyTree:
    """ "theta" or "omega" for every trained leaf."""

    def half(path: Any, _: Any) -> str:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return "theta" if name in COEFFICIENTS else "omega"

    return jax.tree_util.tree_map_with_path(half, train)


def alone(half: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on one half of the trained leaves; the other half stays as it is, to the bit."""
    still = {"omega": optax.set_to_zero(), "theta": optax.set_to_zero()}
    return optax.partition({**still, half: tx}, halves)


def experiment(model: str, train: Path, held_out: Path, steps: int) -> sx.Experiment:
    """MiLoRA of rank 32 on every projection, at the paper's rate."""
    data = sx.Data(str(train), template="{instruction}", answer=" {output}", overlong="truncate")
    return sx.Experiment(
        model,
        data,
        (("self_attn|mlp", sx.MiLoRA(rank=32)),),
        sx.Optimizer(lr=LR, warmup=0.06),
        steps=steps,
        batch_size=16,
        eval=sx.Eval(dataclasses.replace(data, name=str(held_out))),
    )


def train(experiment: sx.Experiment, out: Path, theta_lr: float = THETA_LR) -> list[tuple[float, float]]:
    """Train, and write the adapter to `out`. Returns the losses of both halves' steps, before each step."""
    model = sx.read_model(experiment)
    batches, _ = sx.read_data(experiment, model, print)
    held_out = sx.read_held_out(experiment, model, print)
    prepared = sx.prepare(experiment, model, experiment.steps)
    parts = prepared.adapt(model.params)
    txs = {"omega": alone("omega", prepared.tx), "theta": alone("theta", optax.adam(theta_lr))}
    # The number of steps so far, which goes up with either step, is part of each step's key of dropout.
    steps = {half: sx.make_step(prepared.model, tx, prepared.streams.dropout) for half, tx in txs.items()}
    state = prepared.start(parts)
    opts, losses = {half: tx.init(state.train) for half, tx in txs.items()}, []
    for number in range(experiment.steps):
        # A batch has an axis of microbatches in front; a held-out one has none.
        other = jax.tree.map(lambda array: array[None], held_out[number % len(held_out)])
        pair = []
        for half, batch in (("omega", batches[number]), ("theta", other)):
            before = dataclasses.replace(state, opt=opts[half])
            state, numbers = steps[half](before, parts.frozen, parts.base, batch)
            opts[half] = state.opt
            pair.append(float(numbers["loss"]))
        losses.append((pair[0], pair[1]))
        print(f"step {number + 1}: loss {pair[0]:.4f}, held out {pair[1]:.4f}")
    adapters = sx.combine(state.train["adapters"], parts.frozen)
    sx.save_adapter(out / "adapter", adapters, rules=experiment.rules, about={"model": experiment.model})
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    train(experiment(arguments.model, arguments.train, arguments.held_out, arguments.steps), arguments.out)


if __name__ == "__main__":
    main()
