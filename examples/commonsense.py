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
from sborax.evaluate import Scorer, chosen, evaluate
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


def right(scores: Path, task: str) -> dict[int, bool]:
    """Whether each item that was scored has its right option chosen."""
    items = map(json.loads, (scores / f"{task}.jsonl").read_text().splitlines())
    return {item["item"]: item["chosen"] == item["gold"] for item in items}


def in_errors(difference: float, error: float) -> str:
    """A difference in standard errors, where there is one: not if all items changed alike."""
    return f"{difference / error:+.1f}" if error else "-"


def table(base: Path, trained: Path, tasks: Sequence[Choice]) -> str:
    """Both accuracies of each task, and their difference with its standard error; then the means over tasks.

    Base and run answer the same items, so the error of the difference is that of the mean of each item's own.
    """
    lines = ["| task | n | base | trained | difference | in standard errors |", "|---|---|---|---|---|---|"]
    means = []
    for task in tasks:
        before, after = right(base, task.name), right(trained, task.name)
        pairs = np.array([(before[item], after[item]) for item in before], float)
        gained = pairs[:, 1] - pairs[:, 0]
        means.append((*pairs.mean(0), gained.mean(), gained.std(ddof=1) / math.sqrt(len(gained))))
        lines.append(f"| {task.name} | {len(gained):,} | {told(*means[-1])} |")
    old, new, difference, _ = np.mean(means, axis=0)
    error = math.hypot(*(one[-1] for one in means)) / len(means)
    lines.append(f"| mean | | {told(old, new, difference, error)} |")
    return "\n".join(lines)


def told(old: float, new: float, difference: float, error: float) -> str:
    """The numbers of a row."""
    return f"{old:.3f} | {new:.3f} | {difference:+.3f} ± {error:.3f} | {in_errors(difference, error)}"


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
    evaluate(tasks, scorer, limit=given.limit, out=given.out / "trained", trained_on=known)
    base = load_model(given.model)
    evaluate(tasks, Scorer.of(base, base.params), limit=given.limit, out=given.out / "base")
    text = table(given.out / "base", given.out / "trained", tasks)
    (given.out / "table.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
