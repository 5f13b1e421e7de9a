"""Train on the training sets of ARC, OpenBookQA, SIQA and BoolQ, and compare with the base on their test sets.

    python examples/commonsense.py MODEL --data DIR --out runs/commonsense

DIR is the `dataset/` of github.com/AGI-Edgerunners/LLM-Adapters: `ARC-Easy/train.json`, `ARC-Easy/test.json`, ... An
answer is the option of the largest likelihood; the model learns to write the right one after the prompt that the test
asks with. The table is printed, and kept in `table.md` of the run.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import sborax as sx
from sborax.cli.targets import load_run
from sborax.data.source import read
from sborax.evaluate import Score, Scorer, chosen, evaluate
from sborax.evaluate.choice import Choice
from sborax.models import load_model
from sborax.train.loop import train

TASKS = "arc_easy,arc_challenge,openbookqa,social_i_qa,boolq"
PROMPT, ANSWER = "{prompt}", "{option}"


def write_training_data(tasks: Sequence[Choice], place: Path) -> int:
    """Every training question with its right option, but for those that are in a test set; how many there are."""
    tests = {record["instruction"] for task in tasks for record in read(task.data, "test")}
    samples = []
    for task in tasks:
        for record in read(task.data, "train"):
            if record["instruction"] in tests:
                continue
            asked = task.ask(record)
            # The instruction is kept so that `sborax eval` can look for test questions in it.
            samples.append(
                {
                    "prompt": asked.prompts[0],
                    "option": asked.options[asked.gold],
                    "instruction": record["instruction"],
                }
            )
    place.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    return len(samples)


def experiment(model: str, data: Path, steps: int, lr: float) -> sx.Experiment:
    """LoRA of rank 16 on every layer."""
    return sx.Experiment(
        model,
        sx.Data(str(data), template=PROMPT, answer=ANSWER, max_length=128, buckets=(64, 128)),
        (("self_attn|mlp", sx.LoRA(rank=16)),),
        sx.Optimizer(lr=lr, warmup=0.1),
        steps=steps,
        batch_size=16,
    )


def in_errors(difference: float, error: float) -> str:
    """A difference in standard errors, where there is one: not if every answer was right, or every one wrong."""
    return f"{difference / error:+.1f}" if error else "-"


def table(base: Sequence[Score], trained: Sequence[Score]) -> str:
    """Both accuracies of each task, and their difference in its own standard errors; then the mean over tasks."""
    lines = ["| task | n | base | trained | difference | in standard errors |", "|---|---|---|---|---|---|"]
    differences, errors = [], []
    for before, after in zip(base, trained, strict=True):
        old, new = before.metrics["acc"], after.metrics["acc"]
        differences.append(new.value - old.value)
        errors.append(math.hypot(old.stderr or 0.0, new.stderr or 0.0))
        cells = (f"{one.value:.3f} ± {one.stderr:.3f}" for one in (old, new))
        told = f"{differences[-1]:+.3f} | {in_errors(differences[-1], errors[-1])}"
        lines.append(f"| {before.task.name} | {before.n:,} | {' | '.join(cells)} | {told} |")
    mean, error = float(np.mean(differences)), math.sqrt(sum(e**2 for e in errors)) / len(errors)
    lines.append(f"| mean | | | | {mean:+.3f} ± {error:.3f} | {in_errors(mean, error)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default=os.environ.get("SBORAX_DATA"), help="$SBORAX_DATA by default")
    parser.add_argument("--out", type=Path, default=Path("runs/commonsense"))
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--limit", type=int, help="score so many items of each task, drawn with seed 0")
    given = parser.parse_args()
    if given.limit is not None and given.limit < 2:
        parser.error("--limit: 2 or more, one item has no standard error")
    if given.data is None:
        parser.error("give --data DIR, or set SBORAX_DATA")
    os.environ["SBORAX_DATA"] = given.data
    tasks = [task for task in chosen(given.tasks) if isinstance(task, Choice)]
    given.out.mkdir(parents=True)
    samples = given.out / "train.jsonl"
    print(f"{write_training_data(tasks, samples):,} training samples", flush=True)
    run = given.out / "run"
    train(experiment(given.model, samples, given.steps, given.lr), run)
    target = load_run(str(run))
    scorer = Scorer.of(target.model, target.params, target.adapters)
    known = list(read(str(samples)))
    trained = evaluate(tasks, scorer, limit=given.limit, out=given.out / "trained", trained_on=known)
    base = load_model(given.model)
    before = evaluate(tasks, Scorer.of(base, base.params), limit=given.limit, out=given.out / "base")
    text = table(before, trained)
    (given.out / "table.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
