"""The training step on 256 TPU chips, judged without one: python -m benchmarks.pods compile, then page

compile: compiles what is missing for TPU slices (needs the package libtpu), one step after the other, and appends
FLOPs, bytes and memory of each to benchmarks/pods.jsonl. A step whose program and versions are those of its stored line
is not compiled again, so a run that was cut off continues. A step takes minutes of a core.
page: writes docs/performance.md from that file. Nothing has run on a TPU: times are the least that the chip's published
rates allow.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from benchmarks.__main__ import number, version
from benchmarks.shapes import SHAPES, kernels, minimum_flops, model_flops
from benchmarks.tpu import step
from sborax.plans.ahead import Outline, argument_bytes, lowered, on_mesh, pod_mesh
from sborax.plans.hlo import collective_bytes, matmul_flops, memory_bytes, overlapped_bytes
from sborax.plans.roofline import CHIPS, Roofline, attention_flops, received_bytes, roofline
from sborax.train.head_loss import CHUNK

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "pods.jsonl"
PAGE = ROOT / "docs" / "performance.md"
LENGTH = 2048
CHIPS_OF_A_SLICE = 256
SLICES = {"v5e": "v5e:16x16", "v5p": "v5p:4x8x8", "v6e": "v6e:16x16"}
MESHES = {"v5e": {"fsdp": 256}, "v5p": {"data": 4, "fsdp": 64}, "v6e": {"fsdp": 256}}
"""By chip. An axis that spans all three dimensions of a v5p slice gathers by all-reduces, which are received twice."""
_OFFLOAD = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
}
OPTIONS: dict[str, dict[str, str]] = {"v5e": {}, "v5p": _OFFLOAD, "v6e": _OFFLOAD}
"""Of the compiler, by chip. Without them gathers run beside products on v5e alone."""
METHODS = ("LoRA", "QLoRA", "SBoRA-FA", "QSBoRA-FA", "Bone", "QBone")
"""Those with a Q stand on an NF4 base."""
SENT_GOALS = {method: 1.15 for method in METHODS}
"""The most that a step may send over the least, by method."""


@dataclasses.dataclass(frozen=True)
class Pod:
    """One step to compile.

    - shape: a name in `SHAPES`.
    - chip: a name in `SLICES`.
    - method: a name in `METHODS`.
    - rows: of 2,048 tokens on each chip.
    - remat: as in `Experiment`.
    """

    shape: str
    chip: str
    method: str
    rows: int
    remat: str

    @property
    def name(self) -> str:
        """Its name in the file of results."""
        return f"{self.shape}, {SLICES[self.chip]}, {self.method}, {self.rows} rows, {self.remat}"


SETTINGS = {
    ("LLaMA-2-7B", "v5e"): (1, "cheap"),
    ("LLaMA-3.1-8B", "v5e"): (1, "cheap"),
    ("LLaMA-3.1-70B", "v5e"): (1, "full"),
    ("LLaMA-2-7B", "v5p"): (4, "cheap"),
    ("LLaMA-3.1-8B", "v5p"): (4, "cheap"),
    ("LLaMA-3.1-70B", "v5p"): (2, "cheap"),
    ("LLaMA-2-7B", "v6e"): (3, "cheap"),
    ("LLaMA-3.1-8B", "v6e"): (3, "cheap"),
    ("LLaMA-3.1-70B", "v6e"): (4, "full"),
}
"""Rows of a chip and `remat` by shape and chip: as many tokens as fit, and "full" only where "cheap" does not fit."""


def pods() -> list[Pod]:
    """All steps, in the order in which they are compiled."""
    return [
        Pod(shape, chip, method, *setting)
        for kind in SLICES
        for method in METHODS
        for (shape, chip), setting in SETTINGS.items()
        if chip == kind
    ]


def about(pod: Pod, program: Any) -> dict[str, Any]:
    """Versions, options, and digests of the lowered program and of the code that reads the compiled one."""
    plans = ROOT / "sborax" / "plans"
    reading = b"".join((plans / name).read_bytes() for name in ("hlo.py", "ahead.py"))
    return {
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "libtpu")},
        "options": OPTIONS[pod.chip],
        "program": digest(program.as_text().encode()),
        "reading": digest(reading),
    }


def digest(content: bytes) -> str:
    """The beginning of a SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def planned(pod: Pod) -> Outline:
    """The step of a pod, laid out over its chips."""
    mesh = pod_mesh(SLICES[pod.chip], MESHES[pod.chip])
    return on_mesh(step(pod.shape, pod.method, pod.rows * CHIPS_OF_A_SLICE, LENGTH, pod.remat, "splash"), mesh)


def stored(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The latest line of each step, by name."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["pod"]: line for line in lines}


def measure(pod: Pod, outlined: Outline, traced: Any) -> dict[str, Any]:
    """What the compiled step computes, moves, sends and holds on each chip; or why the compiler refused it."""
    began = time.perf_counter()
    result: dict[str, Any] = {
        "arguments": argument_bytes(outlined),
        "trained": outlined.parts.count,
        "state": sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((outlined.state.train, outlined.state.opt))
        ),
        "base": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(outlined.parts.base)),
    }
    try:
        program = traced.compile(compiler_options=OPTIONS[pod.chip])
    except jax.errors.JaxRuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if "hbm" in line.lower()]
        return {**result, "refused": lines[0] if lines else str(error).splitlines()[0]}
    text, memory = program.as_text(), program.memory_analysis()
    most = pod.rows * LENGTH // CHUNK
    return {
        **result,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "matmul_flops": matmul_flops(text, most),
        "hbm_bytes": memory_bytes(text, most),
        "sent_bytes": collective_bytes(text),
        "overlapped_bytes": overlapped_bytes(text),
        "compile_seconds": round(time.perf_counter() - began),
    }


def least_flops(pod: Pod, trained: int) -> float:
    """4N + 6 x trained FLOPs for each token of a chip, attention left out."""
    shape = SHAPES[pod.shape]
    tokens = minimum_flops(shape, pod.rows, LENGTH, trained)
    width = shape["num_attention_heads"] * shape["head_dim"]
    return tokens - shape["num_hidden_layers"] * 12 * pod.rows * LENGTH**2 * width


def least_sent(pod: Pod, trained: int) -> float:
    """The least bytes of results of collectives on a chip.

    Kernels come twice as they are stored, for the forward and the backward pass; trained leaves twice in bfloat16, and
    their gradients once in float32. The table of tokens is not gathered.
    """
    shape = SHAPES[pod.shape]
    layers = shape["num_hidden_layers"] * sum(fan_in * fan_out for fan_in, fan_out in kernels(shape))
    # An NF4 weight is half a byte, and a 64th for its scale.
    stored_layers = layers * (0.5 + 1 / 64) if pod.method.startswith("Q") else 2 * layers
    return 2 * (stored_layers + 2 * shape["hidden_size"] * shape["vocab_size"]) + (2 * 2 + 4) * trained


def held(result: dict[str, Any]) -> int:
    """Bytes of HBM that a step holds on each chip."""
    return result["argument_bytes"] + result["temporary_bytes"]


def roofline_of(pod: Pod, result: dict[str, Any]) -> Roofline:
    """The roofline of a stored step."""
    shape = SHAPES[pod.shape]
    width = shape["num_attention_heads"] * shape["head_dim"]
    attention = attention_flops(shape["num_hidden_layers"], width, pod.rows, LENGTH, pod.remat == "full")
    received = received_bytes(result["sent_bytes"], CHIPS_OF_A_SLICE)
    return roofline(CHIPS[pod.chip], result["matmul_flops"] + attention, result["hbm_bytes"], received)


def utilisation(pod: Pod, result: dict[str, Any]) -> float:
    """4N FLOPs a token over the chip's peak, if a step took no longer than its roofline."""
    flops = model_flops(SHAPES[pod.shape], pod.rows, LENGTH)
    return flops / (roofline_of(pod, result).seconds * CHIPS[pod.chip].flops)


def main() -> None:
    """Compile what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compile", "page"))
    parser.add_argument("--only", default="", help="compile only steps whose name has this text in it")
    parser.add_argument("--again", action="store_true", help="compile steps anew that are stored")
    args = parser.parse_args()
    if args.what == "page":
        from benchmarks.pods_page import page

        PAGE.write_text(page(stored()))
        return
    lines = stored()
    for pod in (pod for pod in pods() if args.only in pod.name):
        outlined = planned(pod)
        program = lowered(outlined)
        line, facts = lines.get(pod.name, {}), about(pod, program)
        if all(line.get(name) == value for name, value in facts.items()) and not args.again:
            continue
        result = measure(pod, outlined, program)
        with RESULTS.open("a") as file:
            file.write(json.dumps({"pod": pod.name, **facts, "result": result}) + "\n")
        seconds = number(result.get("compile_seconds"), 0)
        print(f"{pod.name}: {result.get('refused', f'compiled in {seconds} s')}", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
