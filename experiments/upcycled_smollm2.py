"""Fine-tune the experts of a mixture made from SmolLM2-135M: python -m experiments.upcycled_smollm2 DATA OUT

Sparse upcycling (arXiv:2212.05055): each MLP becomes several experts that start as its copies, behind a new router.
The mixture starts with the function of the dense model, and training tells its experts apart. LoRA, SBoRA-FA and Bone
train all experts and the routers on E2E NLG, from `DATA/e2e_nlg`. OUT gets the base as a Mixtral, a directory for each
run, what the experts did in `experts.json`, and the page of `sborax compare`. Runs that are there are not made again.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sborax as sx
from sborax.adapters.core import AbstractMethod
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.tree import merged_node, nodes
from sborax.cli.fetch import smollm2
from sborax.cli.main import main as cli
from sborax.cli.targets import load_run
from sborax.models.config import Experts, LlamaConfig
from sborax.models.language_model import LanguageModel, Params, decoder_of
from sborax.train.loop import train
from sborax.train.read import read_held_out, silent

COUNT, CHOSEN = 4, 2
RULE = "mlp/experts"
METHODS = {"LoRA": sx.LoRA(rank=4, alpha=8.0), "SBoRA-FA": sx.SBoRA(rank=8), "Bone": sx.Bone(rank=8)}


def upcycle(
    model: LanguageModel, params: Params, count: int, chosen: int, seed: int = 0
) -> tuple[LanguageModel, Params]:
    """A mixture with `count` copies of each MLP as its experts, of which every token passes `chosen`.

    The weights of the chosen experts add up to 1, so the mixture has the logits of the dense model. Routers are drawn
    from N(0, 0.02^2), as transformers draws them.
    """
    assert isinstance(model.config, LlamaConfig)
    config = dataclasses.replace(
        model.config,
        model_type="mixtral",
        experts=Experts(count, chosen, model.config.intermediate_size, normalised=True),
    )
    leaves: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        if path.startswith("layers/mlp/"):
            # (layers, in, out) becomes (layers, experts, in, out).
            copies = jnp.broadcast_to(leaf[:, None], (leaf.shape[0], count, *leaf.shape[1:]))
            leaves[path.replace("layers/mlp/", "layers/mlp/experts/")] = copies
        else:
            leaves[path] = leaf
    shape = (config.num_hidden_layers, config.hidden_size, count)
    leaves["layers/mlp/router/weight"] = 0.02 * jax.random.normal(jax.random.key(seed), shape)
    return dataclasses.replace(model, module=decoder_of(config), config=config), nest(leaves)


def make_base(place: Path) -> None:
    """Write the mixture as a directory that transformers loads, and check its logits against the dense model's."""
    dense = sx.load_model(smollm2())
    model, params = upcycle(dense, dense.params, COUNT, CHOSEN)
    tokens = jnp.asarray([dense.tokenizer.encode("Upcycled experts are copies of the dense model's MLP.")])
    before, after = dense.apply(dense.params, None, tokens), model.apply(params, None, tokens)
    gap = float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))
    print(f"logits of the mixture and of the dense model differ by {gap:.1e} of the largest", flush=True)
    assert gap < 1e-4
    sx.save_hf(place, model, params)


def experiment(base: Path, data: str, method: AbstractMethod, steps: int) -> sx.Experiment:
    """All experts are adapted by `method`, and the routers are trained."""
    text = {"template": "{mr}\n", "answer": "{ref}", "max_length": 128}
    return sx.Experiment(
        model=str(base),
        data=sx.Data(f"{data}/e2e_nlg/trainset.csv", limit=1000, **text),
        rules=[(RULE, method)],
        train_also=("router",),
        optimizer=sx.Optimizer(lr=3e-3, schedule="cosine", warmup=0.1),
        eval=sx.Eval(data=sx.Data(f"{data}/e2e_nlg/devset.csv", limit=32, **text), every=steps // 2),
        steps=steps,
        batch_size=4,
    )


def of_experts(run: Path) -> dict[str, Any]:
    """What the experts did in a run.

    - moved: (layers, experts), Frobenius norms of the change of an expert's three kernels together, over theirs before.
    - chosen: (experts,), the share of held-out tokens' choices that fell on each expert, a mean over layers.
    """
    target = load_run(str(run))
    assert target.experiment is not None
    leaves, change, before = flatten(target.params), 0.0, 0.0
    for path, node in nodes(target.adapters).items():
        weight = leaves[path]
        change = change + np.asarray(jnp.sum(jnp.square(merged_node(weight, node) - weight), axis=(-2, -1)))
        before = before + np.asarray(jnp.sum(jnp.square(weight), axis=(-2, -1)))
    choices = np.zeros(COUNT)
    for batch in read_held_out(target.experiment, target.model, silent):
        tokens, segments = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"])
        _, collected = target.model.collect(target.params, target.adapters, tokens, {"load"}, segment_ids=segments)
        choices += np.asarray(collected.load.chosen)
    return {"moved": np.sqrt(change / before).tolist(), "chosen": (choices / choices.sum()).tolist()}


def main() -> None:
    """Make the base, run each method, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder with e2e_nlg/trainset.csv and e2e_nlg/devset.csv")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    base = args.out / "base"
    if not (base / "config.json").exists():
        make_base(base)
    report = {}
    for name, method in METHODS.items():
        run = args.out / name
        if not (run / "adapter").exists():
            train(experiment(base, args.data, method, args.steps), run, resume=run.exists())
        report[name] = of_experts(run)
        ratio = np.array(report[name]["moved"])
        shares = ", ".join(f"{share:.2f}" for share in report[name]["chosen"])
        print(
            f"{name}: experts moved by {ratio.min():.1e} .. {ratio.max():.1e} of their norm, {int((ratio == 0).sum())} "
            f"of {ratio.size} did not; held-out choices fell on them {shares}",
            flush=True,
        )
        jax.clear_caches()
    (args.out / "experts.json").write_text(json.dumps(report, indent=1) + "\n")
    cli(["compare", *(str(args.out / name) for name in METHODS), "--by", "method", "--out", str(args.out / "compare")])


if __name__ == "__main__":
    main()
