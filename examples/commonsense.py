"""Train on the training sets of ARC, OpenBookQA, SIQA and BoolQ, and compare with the base on their test sets.

    python examples/commonsense.py MODEL --data DIR --out runs/commonsense

DIR is the `dataset/` of github.com/AGI-Edgerunners/LLM-Adapters: `ARC-Easy/train.json`, `ARC-Easy/test.json`, ... The
answer to a question is its likeliest option. The model learns to write the right option after the prompt of the test.
The table is printed and written to `table.md` of the run.
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
    """Write every training question that is in no test set, with its right option. Returns their number."""
    tests = {record["instruction"] for task in tasks for record in read(task.data, "test")}
    samples = []
    for task in tasks:
        for record in read(task.data, "train"):
            if record["instruction"] in tests:
                continue
            question = task.ask(record)
            # `sborax eval` looks for test questions in the instruction.
            samples.append(
                {
                    "prompt": question.prompts[0],
                    "option": question.options[question.gold],
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
    """Whether the right option was chosen, for each scored item."""
    items = map(json.loads, (scores / f"{task}.jsonl").read_text().splitlines())
    return {item["item"]: item["chosen"] == item["gold"] for item in items}


def in_errors(difference: float, error: float) -> str:
    """A difference in standard errors; "-" if the error is zero, because all items changed alike."""
    return f"{difference / error:+.1f}" if error else "-"


def table(base: Path, trained: Path, tasks: Sequence[Choice]) -> str:
    """Both accuracies of each task and their difference with its standard error, then the means over tasks.

    Base and run answer the same items, so the error is that of the mean of the items' differences.
    """
    lines = ["| task | n | base | trained | difference | in standard errors |", "|---|---|---|---|---|---|"]
    means = []
    for task in tasks:
        before, after = right(base, task.name), right(trained, task.name)
        pairs = np.array([(before[item], after[item]) for item in before], float)
        gained = pairs[:, 1] - pairs[:, 0]
        means.append((*pairs.mean(0), gained.mean(), gained.std(ddof=1) / math.sqrt(len(gained))))
        lines.append(f"| {task.name} | {len(gained):,} | {cells(*means[-1])} |")
    old, new, difference, _ = np.mean(means, axis=0)
    error = math.hypot(*(errors[-1] for errors in means)) / len(means)
    lines.append(f"| mean | | {cells(old, new, difference, error)} |")
    return "\n".join(lines)


def cells(old: float, new: float, difference: float, error: float) -> str:
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
    parser.add_argument("--limit", type=int, help="score N items of each task, drawn with seed 0")
    arguments = parser.parse_args()
    if arguments.limit is not None and arguments.limit < 2:
        parser.error("--limit: 2 or more, one item has no standard error")
    if arguments.data is None:
        parser.error("give --data DIR, or set SBORAX_DATA")
    os.environ["SBORAX_DATA"] = arguments.data
    tasks = [task for task in chosen(arguments.tasks) if isinstance(task, Choice)]
    arguments.out.mkdir(parents=True)
    samples = arguments.out / "train.jsonl"
    print(f"{write_training_data(tasks, samples):,} training samples", flush=True)
    run = arguments.out / "run"
    train(experiment(arguments.model, samples, arguments.steps, arguments.lr), run)
    target = load_run(str(run))
    scorer = Scorer.of(target.model, target.params, target.adapters)
    records = list(read(str(samples)))
    evaluate(tasks, scorer, limit=arguments.limit, out=arguments.out / "trained", trained_on=records)
    base = load_model(arguments.model)
    evaluate(tasks, Scorer.of(base, base.params), limit=arguments.limit, out=arguments.out / "base")
    text = table(arguments.out / "base", arguments.out / "trained", tasks)
    (arguments.out / "table.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
