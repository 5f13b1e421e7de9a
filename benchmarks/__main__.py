"""Every measurement that this machine can make: python -m benchmarks [step] [generation] [scaling] [sweep]

step: one training step of every method, beside PEFT's and qwix's LoRA (where they are installed).
generation: greedy text beside transformers.
scaling: the cost of our step against length, rank and adapted modules.
sweep: the step of 2 and of 6 adapters trained at once over so many single steps.

On a CPU the shape is SmolLM2-135M's, 4 x 256 tokens in float32, two threads; on a GPU `python -m benchmarks.gpu`.
What runs in JAX is compared with LoRA step by step in one process; what runs in torch has a process of its own, and
LoRA one beside it, in turn.
Appends what it measured to benchmarks/results.jsonl. Goals that are missed are marked.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.runner import time_ratio
from benchmarks.shapes import SHAPES, minimum_flops, model_flops
from benchmarks.worker import run

RESULTS = Path(__file__).parent / "results.jsonl"
TABLES = ["step", "generation", "scaling", "sweep"]
PEERS = ("PEFT", "PEFT, compiled", "qwix")
METHODS = (
    "LoRA", "SBoRA-FA", "SBoRA-FB", "Bone", "Bat", "DoRA", "PiSSA", "SARA", "Mo-SARA", "QLoRA", "QSBoRA-FA", "full",
)  # fmt: skip
GOALS = {"SBoRA-FA": 1.05, "Bone": 1.05, "DoRA": 1 / 1.12, "Bat": 1 / 1.2}
"""Speed over our LoRA's that we want at least."""
FLOPS_GOAL, PEFT_GOAL, GENERATION_GOAL = 1.05, 1.0, 1.0


def short(value: float, goal: float | None, at_most: bool = False) -> str:
    """A cell, marked where it misses its goal."""
    missed = goal is not None and (value > goal if at_most else value < goal)
    return f"{value:.3f}" + (f" (goal {goal:.2f})" if missed else "")


def show(heading: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table in Markdown."""
    print(f"\n{heading}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def number(value: float | None, digits: int = 2) -> str:
    """A cell that may be empty."""
    return "" if value is None else f"{value:.{digits}f}"


def attempt(name: str, **task: Any) -> dict[str, Any] | None:
    """A measurement, or None and a line that says why there is none."""
    try:
        return run(**task)
    except RuntimeError as error:
        print(f"{name}: not measured ({error})", flush=True)
        return None


def step(case: dict[str, Any], rounds: int, steps: int, only: list[str]) -> dict[str, Any]:
    """The table of training steps."""
    shape, tokens = SHAPES[case["shape"]], case["batch"] * case["length"]
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for name in (name for name in PEERS if name in only):
            told = attempt(name, what=name, case=case, steps=steps)
            # One in torch has a process of its own, and LoRA another, next to it in time.
            if told and "own_seconds" not in told:
                own = run(what="measure", case=case, steps=steps)
                told |= {"own_seconds": own["seconds"], "own_peak_gib": own["peak_gib"]}
            found.setdefault(name, []).extend([told] if told else [])
    bound = run(what="matmul", case=case)["flops_per_second"]
    record: dict[str, Any] = {"matmul_gflops": bound / 1e9, "rows": {}}
    rows = []
    for name, all_told in found.items():
        if not all_told:
            continue
        theirs, own = ([s for told in all_told for s in told[key]] for key in ("seconds", "own_seconds"))
        ratio, told = time_ratio(theirs, own), all_told[0]
        known = {key: told.get(key) for key in ("temp_gib", "peak_gib", "compile_seconds", "own_peak_gib", "trainable")}
        record["rows"][name] = {"lora_over_it": ratio, **known}
        cells = [number(value) for key, value in known.items() if key != "trainable"]
        goal = PEFT_GOAL if name.startswith("PEFT") else None
        rows.append([name, short(ratio, goal), *cells, f"{told['trainable']:,}"])
    columns = ["peer, LoRA", "our LoRA's speed over it", "temp GiB", "peak GiB", "compile s", "our peak GiB", "trained"]
    show("Peers", columns, rows)
    rows = []
    for name in (name for name in METHODS if name in only):
        own = {**case, "method": name}
        told = attempt(name, what="pair", case=own, other={**case, "method": "LoRA"}, steps=rounds * steps)
        if told is None:
            continue
        least = minimum_flops(shape, case["batch"], case["length"], told["trainable"], name == "full")
        # The head is trained in chunks there, a loop of which XLA counts one turn.
        counted = attempt(f"FLOPs of {name}", what="flops", case=own) if name != "full" else None
        over = counted["flops"] / least if counted else None
        seconds = statistics.median(told["seconds"])
        used = model_flops(shape, case["batch"], case["length"]) / seconds / bound
        row = {"over_lora": told["speed_over_other"], "flops_over_minimum": over, "tokens_per_second": tokens / seconds}
        row |= {"mfu_4n_of_matmul": used, **{key: told[key] for key in told if not key.endswith("seconds")}}
        record["rows"][name] = row | {"compile_seconds": told["compile_seconds"]}
        rows.append(
            [
                name,
                short(told["speed_over_other"], GOALS.get(name)),
                "" if over is None else short(over, None if name.startswith(("Q", "Mo", "Bat")) else FLOPS_GOAL, True),
                number(100 * used, 0),
                *(number(told[key]) for key in ("temp_gib", "held_gib", "compile_seconds")),
                f"{told['trainable']:,}",
            ]
        )
    columns = ["method", "speed over our LoRA's", "FLOPs over the least", "% of the matmul bound at 4N"]
    show("Methods", [*columns, "temp GiB", "held GiB", "compile s", "trained"], rows)
    return record


def generation(shape: str, rounds: int, batch: int = 16, new: int = 64) -> dict[str, Any]:
    """Whole calls, prefill included, in turn."""
    task = {"shape": shape, "batch": batch, "new": new, "rounds": 2}
    told = {name: [run(what=f"{name} generates", **task) for _ in range(rounds)] for name in ("transformers", "sborax")}
    speed = {
        name: batch * new / statistics.median(s for part in parts for s in part["seconds"])
        for name, parts in told.items()
    }
    ratio = speed["sborax"] / speed["transformers"]
    heading = f"Greedy text, {batch} prompts of 8 to 32 tokens, {new} new tokens each"
    show(heading, ["sborax over transformers"], [[short(ratio, GENERATION_GOAL)]])
    return {"over_transformers": ratio}


def scaling(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Step time of LoRA against one thing at a time, each in turn with the common case."""
    arms: list[tuple[str, dict[str, Any]]] = [
        *((f"{length} tokens a row, as many in all", {"length": length, "batch": 1024 // length})
          for length in (128, 512, 1024)),
        *((f"rank {rank}", {"rank": rank}) for rank in (4, 64)),
        *((f"only {modules}", {"modules": modules}) for modules in ("(q|v)_proj", "self_attn", "mlp")),
    ]  # fmt: skip
    rows, record = [], {}
    for name, change in arms:
        told = attempt(name, what="pair", case={**case, **change}, other=case, steps=steps)
        if told is None:
            continue
        ratio = 1 / told["speed_over_other"]
        record[name] = {"step_over_common": ratio, "temp_gib": told["temp_gib"], "trainable": told["trainable"]}
        rows.append([name, f"{ratio:.3f}", number(told["temp_gib"]), f"{told['trainable']:,}"])
    columns = ["changed", "time", "temp GiB", "trained"]
    show("LoRA's step, time over that of the common case", columns, rows)
    return record


def sweep(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """K adapters at once against K single steps."""
    rows, record = [], {}
    for members in (2, 6):
        told = attempt(f"{members} adapters", what="sweep", case=case, members=members, steps=steps)
        for name in ("lax.map", "vmap") if told else ():
            own, single = told[name], told["single"]
            record[f"{members}, {name}"] = {key: own[key] for key in own if key != "seconds"}
            cells = [number(cell) for cell in (own["temp_gib"], single["temp_gib"], own["compile_seconds"])]
            rows.append([str(members), name, f"{own['over_single_runs']:.3f}", *cells])
    columns = ["adapters", "by", "time over so many single steps", "temp GiB", "a single's", "compile s"]
    show(f"{case['method']} over {case.get('layers', 'all')} layers, several adapters at once", columns, rows)
    return record


def main() -> None:
    """Measure what is asked for and keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=TABLES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each process")
    parser.add_argument("--only", default=";".join(METHODS + PEERS), help="rows of step, with semicolons between")
    parser.add_argument("--shape", default="SmolLM2-135M", choices=SHAPES)
    args = parser.parse_args()
    unknown = sorted(set(args.tables) - set(TABLES))
    only = args.only.split(";")
    unknown += sorted(set(only) - {*METHODS, *PEERS})
    if unknown:
        parser.error(f"{unknown[0]!r} is neither a table nor a row of one")
    case = {"method": "LoRA", "shape": args.shape, "rank": 16, "batch": 4, "length": 256, "dtype": "float32"}
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "flax", "torch", "peft", "transformers", "qwix")},
        "case": case,
    }
    print(json.dumps(record))
    try:
        if "step" in args.tables:
            record["step"] = step(case, args.rounds, args.steps, only)
        if "generation" in args.tables:
            record["generation"] = generation(args.shape, args.rounds)
        if "scaling" in args.tables:
            record["scaling"] = scaling(case, args.rounds * args.steps)
        if "sweep" in args.tables:
            # Fewer layers: the ratio does not depend on them, and six times their activations are held.
            record["sweep"] = sweep({**case, "method": "SBoRA-FA", "layers": 4}, args.rounds * args.steps)
    finally:
        # A table that fails takes nothing from those before it.
        with RESULTS.open("a") as file:
            file.write(json.dumps(rounded(record)) + "\n")


def rounded(tree: Any) -> Any:
    """The record with four digits."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return round(tree, 4) if isinstance(tree, float) else tree


def version(package: str) -> str | None:
    """An installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
