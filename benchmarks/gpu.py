"""The training step on one GPU, without a download: python -m benchmarks.gpu [--only NAME ...]

First what the GPU computes beside the CPU (`benchmarks.checks`), then tables of steps. Random bfloat16 weights of the
real shapes, LoRA rank 16 on all seven linears, rows packed with four documents, and attention by cuDNN. PEFT is
measured too, eager and with compiled layers, if torch and peft are installed. Cases of one shape alternate in one
process; peers run in processes of their own. Utilisation is 4N FLOPs a token over the card's peak (`--peak`, dense
bfloat16; 989 TFLOP/s for an H100 or H200).

Each part is appended to `--out` when it ends, with the card, versions and a digest of the code. Parts that are there
already are not measured again: a run that was cut off continues, and `--again` measures anew. `--tiny` tries the whole
program on any device.
"""

import argparse
import datetime
import hashlib
import json
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.__main__ import RESULTS, attempt, number, rounded, short, show, version
from benchmarks.checks import CHECKS, failures
from benchmarks.shapes import SHAPES, model_flops
from sborax import methods

COMMON = {"dtype": "bfloat16", "rank": 16, "documents": 4}
METHODS = ("LoRA", "SBoRA-FA", "SBoRA-FB", "Bone", "Bat", "DoRA")
LONG, SHORT = {"batch": 1, "length": 4096}, {"batch": 2, "length": 2048, "remat": "full"}
STEPS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "LLaMA-3.1-8B": [("LoRA", LONG), ("QLoRA", LONG), ("LoRA", SHORT), ("QLoRA", SHORT)],
    "LLaMA-3.2-1B": [(method, {"batch": 4, "length": 2048}) for method in METHODS],
    "LLaMA-3.2-3B": [("LoRA", {"batch": 2, "length": 2048})],
    "SmolLM2-135M": [("LoRA", {"batch": 8, "length": 2048})],
}
"""Cases by shape."""
PEERS = ("PEFT", "PEFT, layers compiled")
"""What the first case of every shape is measured beside."""
SWEEPS = {"SmolLM2-135M": {"batch": 4, "length": 512}, "LLaMA-3.2-1B": {"batch": 4, "length": 512}}
MEMBERS = 6
TINY = {"shape": "tiny", "layers": 2, "length": 64, "batch": 2, "dtype": "float32", "rank": 4}

HELD_GOALS = {("LLaMA-3.1-8B", 2048, "LoRA"): 20.0, ("LLaMA-3.1-8B", 2048, "QLoRA"): 9.0}
"""The most GiB that the step may hold, by shape, length and method."""
SPEED_GOALS = {("LLaMA-3.1-8B", 4096, "LoRA"): 12_000.0}
"""The least tokens a second."""
TIME_GOALS = {"DoRA": 1.1, "Bat": 1.3, "SBoRA-FA": 0.95, "Bone": 0.97, "QLoRA": 1 / 0.85}
"""The most time over that of LoRA's step."""
PEER_GOALS = {"LLaMA-3.1-8B": 1.3, "LLaMA-3.2-3B": 2.0, "LLaMA-3.2-1B": 2.0, "SmolLM2-135M": 2.0}
"""The least speed of our LoRA over a peer's."""
SWEEP_GOAL = 0.6


def parts() -> dict[str, dict[str, Any]]:
    """The tasks of all parts, by name."""
    tasks: dict[str, dict[str, Any]] = {"checks": {"what": "checks"}}
    for shape, arms in STEPS.items():
        first, *variants = ({**COMMON, "shape": shape, "method": method, **changes} for method, changes in arms)
        tasks[f"{shape}, steps"] = {"what": "arms", "case": first, "others": variants}
        tasks |= {f"{shape}, {peer}": {"what": peer, "case": {"remat": "cheap", **first}} for peer in PEERS}
    for shape, changes in SWEEPS.items():
        case = {**COMMON, "documents": 1, "shape": shape, "method": "SBoRA-FA", **changes}
        tasks[f"{shape}, sweep"] = {"what": "sweep", "case": case, "members": MEMBERS}
    return tasks


def read(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The results of parts that were measured on this card with this code and these versions."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {
        line["part"]: line["result"]
        for line in lines
        if "part" in line and all(line.get(name) == about[name] for name in ("card", "versions", "code"))
    }


def code() -> str:
    """A digest of the package and of the benchmarks, so that results of other code are measured again."""
    root = Path(__file__).resolve().parents[1]
    files = sorted(path for folder in ("sborax", "benchmarks") for path in (root / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def card_name() -> str:
    """The first GPU, by the driver: JAX in this process would reserve the memory that is measured."""
    cards = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    return cards.splitlines()[0].split(" (UUID")[0]


def show_checks(outcomes: dict[str, Any]) -> None:
    """Print the checks that failed, and how many there were."""
    lines = failures(outcomes)
    print("\n".join(["", *lines, f"checks of {len(outcomes)} subjects, {len(lines)} failed"]), flush=True)


def show_steps(results: dict[str, Any], tasks: dict[str, dict[str, Any]], peak: float) -> None:
    """Print the table of our steps, and that of peers."""
    rows, peers = [], []
    for shape in STEPS:
        name = f"{shape}, steps"
        if name not in results:
            continue
        cases = [tasks[name]["case"], *tasks[name]["others"]]
        measured = list(zip(cases, results[name]["cases"], strict=True))
        medians = {(case["length"], case["method"]): statistics.median(got["seconds"]) for case, got in measured}
        for case, got in measured:
            length, method = case["length"], case["method"]
            seconds = medians[length, method]
            tokens = case["batch"] * length / seconds
            goal = SPEED_GOALS.get((shape, length, method), 0.0)
            mfu = model_flops(SHAPES[case["shape"]], case["batch"], length) / seconds / (peak * 1e12)
            rows.append(
                [
                    f"{shape}, {case['batch']} x {length}",
                    method,
                    f"{tokens:,.0f}" + (f" (goal {goal:,.0f})" if tokens < goal else ""),
                    number(100 * mfu, 0),
                    short(seconds / medians[length, "LoRA"], TIME_GOALS.get(method), at_most=True),
                    short(got["held_gib"], HELD_GOALS.get((shape, length, method)), at_most=True),
                ]
            )
        case, got = measured[0]
        for peer in PEERS:
            if (theirs := results.get(f"{shape}, {peer}")) is None:
                continue
            seconds = statistics.median(theirs["seconds"])
            ratio = short(seconds / medians[case["length"], "LoRA"], PEER_GOALS[shape])
            speed = f"{case['batch'] * case['length'] / seconds:,.0f}"
            peers.append(
                [f"{shape}, {case['batch']} x {case['length']}", peer, speed, ratio, number(theirs["peak_gib"])]
            )
    columns = ["shape", "method", "tokens/s", "% of the peak at 4N", "time over LoRA's", "held GiB"]
    show("Steps", columns, rows)
    show("Peers", ["shape", "peer", "tokens/s", "our LoRA's speed over it", "peak GiB"], peers)


def show_sweeps(results: dict[str, Any]) -> None:
    """Print the table of sweeps."""
    rows = []
    for shape in SWEEPS:
        if (got := results.get(f"{shape}, sweep")) is not None:
            cells = [short(got[name]["over_single_runs"], SWEEP_GOAL, at_most=True) for name in ("vmap", "lax.map")]
            rows.append([shape, str(MEMBERS), *cells])
    show("Sweeps of SBoRA-FA", ["shape", "members", "vmap, time over single steps", "lax.map"], rows)


def main() -> None:
    """Measure what is missing, and print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(parts())
    parser.add_argument("--peak", type=float, default=989.0, help="dense bfloat16 TFLOP/s of the card")
    parser.add_argument("--steps", type=int, default=5, help="timings of each case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results, appended to")
    parser.add_argument("--only", nargs="+", default=names, metavar="NAME", help=f"of {'; '.join(names)}")
    parser.add_argument("--workers", type=int, default=8, help="processes of the checks")
    parser.add_argument("--profile", action="store_true", help="keep the kernels that take most of a step's time")
    parser.add_argument("--again", action="store_true", help="measure parts anew that are in the file of results")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape for all, on any device; no speed to quote")
    args = parser.parse_args()
    if unknown := sorted(set(args.only) - set(names)):
        parser.error(f"{unknown[0]!r} is not a part; the parts are {'; '.join(names)}")
    if shutil.which("nvidia-smi") is None and not args.tiny:
        parser.error("there is no NVIDIA GPU here (nvidia-smi is missing); python -m benchmarks measures on a CPU")
    card = "a tiny trial" if args.tiny else card_name()
    versions = {name: version(name) for name in ("jax", "flax", "torch", "peft", "transformers")}
    about = {"date": datetime.date.today().isoformat(), "card": card, "versions": versions, "code": code()}
    tasks, results = parts(), {} if args.again else read(args.out, about)
    for name in args.only:
        if name in results:
            continue
        task = dict(tasks[name])
        if task["what"] == "checks":
            subjects = [*CHECKS, *(["LoRA"] if args.tiny else methods.__all__)]
            task |= {"what": "all checks", "workers": args.workers, "names": subjects}
        else:
            task["steps"] = args.steps
        if task["what"] == "arms":
            task["profile"] = args.profile
        if args.tiny and "case" in task:
            task["case"] = {**task["case"], **TINY}
            task |= {"others": [{**case, **TINY} for case in task["others"]]} if "others" in task else {}
        result = attempt(name, **task)
        if result is None:
            continue
        results[name] = result
        with args.out.open("a") as file:
            file.write(json.dumps(rounded({**about, "part": name, "result": result})) + "\n")
        print(f"{name}: measured", flush=True)
    if "checks" in results:
        show_checks(results["checks"])
    show_steps(results, tasks, args.peak)
    show_sweeps(results)


if __name__ == "__main__":
    main()
