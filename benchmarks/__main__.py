"""Every benchmark that this machine can run: python -m benchmarks [TABLE ...]

step: one training step of every method, beside PEFT's and qwix's LoRA (where they are installed).
generation: greedy text beside transformers.
scaling: the cost of our step against length, rank and adapted modules.
sweep: the step of 2 and of 6 adapters trained at once, over as many single steps.
packing: useful tokens of packed rows over padded rows (needs the data set alpaca_en_demo under $SBORAX_DATA).
foreign: adapters inside Flax models that are not ours, over merging in the loss (two models come with the extra test).
experts: adapters on experts of a mixture, over dense layers that multiply each token as often.

For CPUs: SmolLM2-135M's shape, 4 x 256 tokens in float32, two threads. For a GPU see `python -m benchmarks.gpu`.
Methods in JAX alternate with LoRA step by step in one process. Peers in torch and our LoRA run in separate processes,
in turn. Appends its results to benchmarks/results.jsonl, and marks missed goals.
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
TABLES = ["step", "generation", "scaling", "sweep", "packing", "foreign", "experts"]
PEERS = ("PEFT", "PEFT, compiled", "qwix")
METHODS = (
    "LoRA", "SBoRA-FA", "SBoRA-FB", "Bone", "Bat", "DoRA", "PiSSA", "SARA", "Mo-SARA", "QLoRA", "QSBoRA-FA", "full",
)  # fmt: skip
FOREIGN = ("three Dense(1024)", "NanoMoE", "Mamba-2")
GOALS = {"SBoRA-FA": 1.05, "Bone": 1.05, "DoRA": 1 / 1.12, "Bat": 1 / 1.2}
"""The least speed over our LoRA's that we want."""
FLOPS_GOAL, PEFT_GOAL, GENERATION_GOAL, PACKING_GOAL, EXPERTS_GOAL = 1.05, 1.0, 1.0, 2.0, 1.3


def short(value: float, goal: float | None, at_most: bool = False) -> str:
    """A cell with a value, and with its goal if it misses that. at_most: the goal is an upper bound."""
    missed = goal is not None and (value > goal if at_most else value < goal)
    return f"{value:.3f}" + (f" (goal {goal:.2f})" if missed else "")


def show(heading: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n{heading}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def number(value: float | None, digits: int = 2) -> str:
    """A cell with a value, empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def attempt(name: str, **task: Any) -> dict[str, Any] | None:
    """The result of a measurement; None, and a printed reason, if it fails."""
    try:
        return run(**task)
    except RuntimeError as error:
        print(f"{name}: not measured ({error})", flush=True)
        return None


def step(case: dict[str, Any], rounds: int, steps: int, only: list[str]) -> dict[str, Any]:
    """Training steps: a table of peers and one of methods."""
    shape, tokens = SHAPES[case["shape"]], case["batch"] * case["length"]
    peers: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for name in (name for name in PEERS if name in only):
            peer = attempt(name, what=name, case=case, steps=steps)
            # A peer in torch has a process to itself. Our LoRA runs in another one, right after it.
            if peer and "our_seconds" not in peer:
                ours = run(what="measure", case=case, steps=steps)
                peer |= {"our_seconds": ours["seconds"], "own_peak_gib": ours["peak_gib"]}
            peers.setdefault(name, []).extend([peer] if peer else [])
    bound = run(what="matmul", case=case)["flops_per_second"]
    record: dict[str, Any] = {"matmul_gflops": bound / 1e9, "rows": {}}
    rows = []
    facts = ("temp_gib", "peak_gib", "compile_seconds", "own_peak_gib", "trainable")
    for name, results in peers.items():
        if not results:
            continue
        theirs, ours = ([s for result in results for s in result[key]] for key in ("seconds", "our_seconds"))
        ratio = time_ratio(theirs, ours)
        row = {key: results[0].get(key) for key in facts}
        record["rows"][name] = {"lora_over_it": ratio, **row}
        cells = [number(value) for key, value in row.items() if key != "trainable"]
        goal = PEFT_GOAL if name.startswith("PEFT") else None
        rows.append([name, short(ratio, goal), *cells, f"{row['trainable']:,}"])
    columns = ["peer, LoRA", "our LoRA's speed over it", "temp GiB", "peak GiB", "compile s", "our peak GiB", "trained"]
    show("Peers", columns, rows)
    rows = []
    for name in (name for name in METHODS if name in only):
        changed = {**case, "method": name}
        result = attempt(name, what="pair", case=changed, other={**case, "method": "LoRA"}, steps=rounds * steps)
        if result is None:
            continue
        least = minimum_flops(shape, case["batch"], case["length"], result["trainable"], name == "full")
        # Full fine-tuning trains the head in chunks, a loop of which XLA counts one iteration.
        counted = attempt(f"FLOPs of {name}", what="flops", case=changed) if name != "full" else None
        over = counted["flops"] / least if counted else None
        seconds = statistics.median(result["seconds"])
        mfu = model_flops(shape, case["batch"], case["length"]) / seconds / bound
        speed = result["speed_over_other"]
        row = {"over_lora": speed, "flops_over_minimum": over, "tokens_per_second": tokens / seconds}
        row |= {"mfu_4n_of_matmul": mfu, **{key: result[key] for key in result if not key.endswith("seconds")}}
        record["rows"][name] = row | {"compile_seconds": result["compile_seconds"]}
        rows.append(
            [
                name,
                short(speed, GOALS.get(name)),
                "" if over is None else short(over, None if name.startswith(("Q", "Mo", "Bat")) else FLOPS_GOAL, True),
                number(100 * mfu, 0),
                *(number(result[key]) for key in ("temp_gib", "held_gib", "compile_seconds")),
                f"{result['trainable']:,}",
            ]
        )
    columns = ["method", "speed over our LoRA's", "FLOPs over the least", "% of the matmul bound at 4N"]
    show("Methods", [*columns, "temp GiB", "held GiB", "compile s", "trained"], rows)
    return record


def generation(shape: str, rounds: int, batch: int = 16, new: int = 64) -> dict[str, Any]:
    """Greedy text here and in transformers, in turn; prefill included."""
    task = {"shape": shape, "batch": batch, "new": new, "rounds": 2}
    results = {
        name: [run(what=f"{name} generates", **task) for _ in range(rounds)] for name in ("transformers", "sborax")
    }
    speed = {
        name: batch * new / statistics.median(s for call in calls for s in call["seconds"])
        for name, calls in results.items()
    }
    ratio = speed["sborax"] / speed["transformers"]
    heading = f"Greedy text, {batch} prompts of 8 to 32 tokens, {new} new tokens each"
    show(heading, ["sborax over transformers"], [[short(ratio, GENERATION_GOAL)]])
    return {"over_transformers": ratio}


def scaling(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Time of LoRA's step with one thing changed, in turn with the common case."""
    arms: list[tuple[str, dict[str, Any]]] = [
        *((f"{length} tokens a row, as many in all", {"length": length, "batch": 1024 // length})
          for length in (128, 512, 1024)),
        *((f"rank {rank}", {"rank": rank}) for rank in (4, 64)),
        *((f"only {modules}", {"modules": modules}) for modules in ("(q|v)_proj", "self_attn", "mlp")),
    ]  # fmt: skip
    rows, record = [], {}
    for name, change in arms:
        result = attempt(name, what="pair", case={**case, **change}, other=case, steps=steps)
        if result is None:
            continue
        ratio = 1 / result["speed_over_other"]
        record[name] = {"step_over_common": ratio, "temp_gib": result["temp_gib"], "trainable": result["trainable"]}
        rows.append([name, f"{ratio:.3f}", number(result["temp_gib"]), f"{result['trainable']:,}"])
    columns = ["changed", "time", "temp GiB", "trained"]
    show("LoRA's step, time over that of the common case", columns, rows)
    return record


def sweep(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Steps of several adapters at once, over as many single steps."""
    rows, record = [], {}
    for members in (2, 6):
        results = attempt(f"{members} adapters", what="sweep", case=case, members=members, steps=steps)
        if results is None:
            continue
        for name in ("lax.map", "vmap"):
            together, single = results[name], results["single"]
            record[f"{members}, {name}"] = {key: together[key] for key in together if key != "seconds"}
            cells = [number(cell) for cell in (together["temp_gib"], single["temp_gib"], together["compile_seconds"])]
            rows.append([str(members), name, f"{together['over_single_runs']:.3f}", *cells])
    columns = ["adapters", "by", "time over so many single steps", "temp GiB", "a single's", "compile s"]
    show(f"{case['method']} over {case.get('layers', 'all')} layers, several adapters at once", columns, rows)
    return record


def packing(steps: int) -> dict[str, Any]:
    """Rows of 512 tokens with several samples, over rows with one."""
    result = attempt("packing", what="packing", data="alpaca_en_demo", batch=8, steps=steps)
    if result is None:
        return {}
    cells = [short(result[name], PACKING_GOAL) for name in ("useful_in_a_row", "useful_in_a_second")]
    rows = [[result["samples"], *(f"{result['rows'][name]:,}" for name in ("packed", "padded")), *cells]]
    columns = ["samples", "packed rows", "padded rows", "useful tokens in a row, packed over padded", "in a second"]
    show("Packing, rows of 512", columns, rows)
    return result


def foreign(steps: int) -> dict[str, Any]:
    """Steps with adapters inside models that are not ours, over steps that merge them."""
    rows, record = [], {}
    for name in FOREIGN:
        result = attempt(name, what="foreign", model=name, steps=steps)
        if result is None:
            continue
        record[name] = result
        cells = (f"{result[key]:.3f}" for key in ("time", "temporaries", "temp_mib", "merged_temp_mib"))
        rows.append([name, *cells, f"{result['difference']:.1e}"])
    columns = ["model", "time over merging", "temporaries", "temp MiB", "merging's", "gradients differ by"]
    show("LoRA inside Flax models that are not ours", columns, rows)
    return record


def experts(steps: int) -> dict[str, Any]:
    """Steps with adapters on experts, over steps of dense layers."""
    rows, record = [], {}
    for name in ("LoRA", "SBoRA-FA", "Bone"):
        result = attempt(name, what="experts", method=name, steps=steps)
        if result is None:
            continue
        record[name] = result
        cells = [short(result["time"], EXPERTS_GOAL, at_most=True), number(result["temporaries"])]
        rows.append([name, *cells, f"{result['trained']:,}", f"{result['dense_trained']:,}"])
    columns = ["method", "time over dense layers", "temporaries", "trained", "dense layers'"]
    show("Adapters on experts, as many multiplied a token as in the dense layers", columns, rows)
    return record


def main() -> None:
    """Run the chosen benchmarks, print their tables and append the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=TABLES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each process")
    parser.add_argument("--only", default=";".join(METHODS + PEERS), help="rows of step, separated by semicolons")
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
            # Few layers: the ratio does not depend on them, and the activations of six members are held.
            record["sweep"] = sweep({**case, "method": "SBoRA-FA", "layers": 4}, args.rounds * args.steps)
        if "packing" in args.tables:
            record["packing"] = packing(6 * args.rounds)
        if "foreign" in args.tables:
            record["foreign"] = foreign(6 * args.rounds)
        if "experts" in args.tables:
            record["experts"] = experts(4 * args.rounds)
    finally:
        # The tables before one that fails are kept.
        with RESULTS.open("a") as file:
            file.write(json.dumps(rounded(record)) + "\n")


def rounded(tree: Any) -> Any:
    """A record with its numbers rounded to four digits."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return round(tree, 4) if isinstance(tree, float) else tree


def version(package: str) -> str | None:
    """The version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
