"""Directories of runs and sweeps as training writes them, made up in a moment: no model is trained."""

import dataclasses
import json
from pathlib import Path

from etils import epath

import sborax as sx
from sborax.records.eval_losses import SampleLoss, write_eval_losses
from sborax.records.report import Summary
from sborax.train.experiment import save_experiment

STEPS = 40
BASE = {"embed_tokens/embedding": "0123456789abcdef", "layers/mlp/up_proj/kernel": "fedcba9876543210"}


def experiment(method=None, lr=1e-3, seed=0, **changes) -> sx.Experiment:
    """Forty steps of one method; the seed is that of the data and of the adapter."""
    settings = {
        "model": "models/tiny",
        "data": sx.Data("train.jsonl"),
        "rules": (sx.Rule("mlp", method or sx.LoRA(rank=4)),),
        "optimizer": sx.Optimizer(lr=lr),
        "eval": sx.Eval(sx.Data("held_out.jsonl"), every=10),
        "steps": STEPS,
        "seed_data": seed,
        "seed_adapter": seed,
    }
    return sx.Experiment(**(settings | changes))


def write_run(
    place: Path,
    described: sx.Experiment,
    loss: float = 1.0,
    *,
    trained: int = 1000,
    memory: int = 1 << 30,
    seconds: float = 0.5,
    samples: str = "100 samples",
    device: str = "1 x cpu",
    base: dict[str, str] | None = BASE,
    finished: bool = True,
    scores: dict[str, list[dict]] | None = None,
    metrics: dict[str, dict[str, float]] | None = None,
    held_out: list[tuple[int, float]] | None = None,
) -> Path:
    """A run whose held-out loss falls from about twice `loss` to `loss`.

    - scores: items by task, as a task's JSONL file has them. metrics: of each task.
    - base: fingerprints in `adapter/plan.json`; None for a run without an adapter.
    - held_out: tokens and nats of each held-out sample, whose mean is `loss`; None where they were not kept.
    """
    place.mkdir(parents=True)
    run = epath.Path(place)
    save_experiment(described, run)
    lines = []
    steps = described.steps or STEPS
    for step in range(1, steps + 1):
        height = loss * (1.0 + (steps - step) / steps)
        lines.append(
            {"step": step, "loss": 1.1 * height, "seconds": 9.0 if step == 1 else seconds, "compiled": step == 1}
        )
        if step % 10 == 0 or step == steps:
            lines.append({"step": step, "eval_loss": height})
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = Summary(
        finished=finished, steps=steps if finished else steps // 2, trainable_parameters=trained, base_parameters=10**6,
        first_loss=2.0, last_loss=1.0, eval_loss=loss, tokens_per_second=100.0, seconds=20.0, peak_memory=memory,
        samples=samples, device=device, versions={"python": "3"}, git_revision=None,
    )  # fmt: skip
    summary.write(run)
    if base is not None:
        (place / "adapter").mkdir()
        (place / "adapter" / "plan.json").write_text(json.dumps({"format": 1, "base": base}))
    if held_out is not None:
        losses = [SampleLoss(f"{number:016x}", *sample) for number, sample in enumerate(held_out)]
        write_eval_losses(run, losses)
    if scores is not None:
        write_scores(place / "scores", scores, metrics or {})
    return place


def write_scores(place: Path, scores: dict[str, list[dict]], metrics: dict[str, dict[str, float]]) -> None:
    """`scores.json` and a JSONL file a task, as `sborax eval` writes them."""
    place.mkdir(parents=True)
    records = []
    for task, items in scores.items():
        numbered = [{"item": number, **item} for number, item in enumerate(items)]
        (place / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in numbered))
        records.append({
            "task": task, "data": f"{task}.json", "split": "test", "protocol": "likelihood", "n": len(items),
            "items": len(items), "limit": None, "seed": 0, "notes": [],
            "metrics": {name: {"value": value, "stderr": None} for name, value in metrics[task].items()},
        })  # fmt: skip
    (place / "scores.json").write_text(json.dumps({"scores": records}))


def answers(right: list[bool], losses: list[float]) -> tuple[list[dict], dict[str, float]]:
    """Items of a task with two options, and the metrics that go with them."""
    items = [
        {
            "prompt": f"question {number}", "options": [" yes", " no"], "gold": 0, "chosen": int(not hit),
            "logprobs": [-2.0 * loss, -3.0], "tokens": [2, 2],
        }
        for number, (hit, loss) in enumerate(zip(right, losses, strict=True))
    ]  # fmt: skip
    return items, {"acc": sum(right) / len(right)}


def write_sweep(
    place: Path,
    method: sx.adapters.core.AbstractMethod,
    losses: dict[tuple[float, int], float | None],
    **settings,
) -> Path:
    """A sweep with one member for every learning rate and seed of the adapter; a loss of None for one that diverged."""
    members = []
    for (lr, seed), loss in losses.items():
        name = f"lr={lr:g},seed_adapter={seed}"
        described = dataclasses.replace(experiment(method, lr), seed_adapter=seed)
        if loss is None:
            write_run(place / name, described, base=None, finished=False, **settings)
        else:
            write_run(place / name, described, loss, **settings)
        diverged = STEPS // 2 if loss is None else None
        members.append({"name": name, "changes": [], "steps": STEPS, "diverged": diverged, "last_loss": loss})
    (place / "sweep.json").write_text(json.dumps({"best": members[0]["name"], "finished": True, "members": members}))
    return place
