"""The training step on one GPU, in under ten minutes and without a download: python -m benchmarks.gpu

Random bfloat16 weights of the real shapes, LoRA rank 16 on all seven linears, rows packed with four documents, and
attention by cuDNN. PEFT is measured, too, eager and compiled, if torch and peft are installed. Utilisation is 4N FLOPs
a token over the card's peak (`--peak`, dense bfloat16; 989 TFLOP/s for an H100 or H200). Appends its results to
benchmarks/results.jsonl.
"""

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
from typing import Any

from benchmarks.__main__ import RESULTS, attempt, number, rounded, short, show, version
from benchmarks.shapes import SHAPES, model_flops

COMMON = {"dtype": "bfloat16", "rank": 16, "documents": 4, "remat": "cheap"}
ARMS: list[tuple[str, str, dict[str, Any]]] = [
    ("8B, 1 x 4096", "LoRA", {"shape": "LLaMA-3.1-8B", "batch": 1, "length": 4096}),
    ("8B, 1 x 4096", "QLoRA", {"shape": "LLaMA-3.1-8B", "batch": 1, "length": 4096}),
    ("8B, 2 x 2048", "LoRA", {"shape": "LLaMA-3.1-8B", "batch": 2, "length": 2048, "remat": "full"}),
    ("8B, 2 x 2048", "QLoRA", {"shape": "LLaMA-3.1-8B", "batch": 2, "length": 2048, "remat": "full"}),
    ("7B, 2 x 2048", "LoRA", {"shape": "LLaMA-2-7B", "batch": 2, "length": 2048}),
    *(("1B, 4 x 2048", method, {"shape": "LLaMA-3.2-1B", "batch": 4, "length": 2048})
      for method in ("LoRA", "SBoRA-FA", "SBoRA-FB", "Bone", "Bat", "DoRA")),
]  # fmt: skip
PEERS = (("8B, 1 x 4096", "PEFT"), ("8B, 1 x 4096", "PEFT, compiled"), ("1B, 4 x 2048", "PEFT"))
PEAK_GOALS = {("8B, 2 x 2048", "LoRA"): 20.0, ("8B, 2 x 2048", "QLoRA"): 9.0}
SPEED_GOALS = {("8B, 1 x 4096", "LoRA"): 12_000.0}
RATIO_GOALS = {("8B, 1 x 4096", "QLoRA"): 0.85}
PEER_GOAL = 1.3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989.0, help="dense bfloat16 TFLOP/s of the card")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        parser.error("there is no NVIDIA GPU here (nvidia-smi is missing); python -m benchmarks measures on a CPU")
    # From the driver: JAX in this process would reserve the memory that is measured.
    cards = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.splitlines()
    rows, speeds, record = [], {}, {}
    for scene, method, changes in ARMS:
        case = {**COMMON, **changes, "method": method}
        result = attempt(f"{scene}, {method}", what="measure", case=case, steps=args.steps)
        if result is None:
            continue
        seconds = statistics.median(result["seconds"])
        tokens = case["batch"] * case["length"] / seconds
        used = model_flops(SHAPES[case["shape"]], case["batch"], case["length"]) / seconds / (args.peak * 1e12)
        speeds[scene, method] = tokens
        peak = short(result["peak_gib"], PEAK_GOALS.get((scene, method)), at_most=True)
        ratio = tokens / speeds.get((scene, "LoRA"), tokens)
        goal = SPEED_GOALS.get((scene, method), 0.0)
        speed = f"{tokens:,.0f}" + (f" (goal {goal:,.0f})" if tokens < goal else "")
        cells = [number(100 * used, 0), short(ratio, RATIO_GOALS.get((scene, method))), peak]
        rows.append([scene, method, speed, *cells])
        record[f"{scene}, {method}"] = {"tokens_per_second": tokens, "mfu_4n": used, "peak_gib": result["peak_gib"]}
    show("Steps", ["shape", "method", "tokens/s", "% of the peak at 4N", "over LoRA", "peak GiB"], rows)
    rows = []
    for scene, peer in PEERS:
        changes = next(changes for name, _, changes in ARMS if name == scene)
        case = {**COMMON, **changes, "method": "LoRA"}
        result = attempt(f"{scene}, {peer}", what=peer, case=case, steps=args.steps)
        if result is None or (scene, "LoRA") not in speeds:
            continue
        tokens = case["batch"] * case["length"] / statistics.median(result["seconds"])
        rows.append([scene, peer, f"{tokens:,.0f}", short(speeds[scene, "LoRA"] / tokens, PEER_GOAL)])
        record[f"{scene}, {peer}"] = {"tokens_per_second": tokens, "peak_gib": result["peak_gib"]}
    show("Peers", ["shape", "peer", "tokens/s", "our LoRA over it"], rows)
    versions = {name: version(name) for name in ("jax", "flax", "torch", "peft")}
    about = {"date": datetime.date.today().isoformat(), "machine": cards[:1], "versions": versions}
    with RESULTS.open("a") as file:
        file.write(json.dumps(rounded({**about, "gpu": record})) + "\n")


if __name__ == "__main__":
    main()
