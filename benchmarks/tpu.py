"""The training step compiled for a TPU slice, without one: python -m benchmarks.tpu (needs the package libtpu)

LLaMA-2-7B's shape in bfloat16, LoRA rank 16 and its relatives on all seven linears, 2,048 tokens a row, one row a chip.
Prints bytes on each chip and bytes sent by kind of collective, from the compiled program. Nothing runs, so no times are
measured. Appends its results to benchmarks/results.jsonl.
"""

import argparse
import datetime
import json
import os
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import sborax as sx
from benchmarks.__main__ import RESULTS, number, rounded, show, version
from benchmarks.ours import METHODS
from benchmarks.shapes import EPS, SHAPES
from sborax.models import LlamaConfig
from sborax.plans.ahead import Outline, compiled, on_mesh, outline, pod_mesh
from sborax.plans.hlo import collective_bytes


def step(shape: str, method: str, rows: int, length: int, remat: str, attention: Any) -> Outline:
    """The step of one method, from shapes."""
    experiment = sx.Experiment(
        shape,
        sx.Data(shape, max_length=length),
        (("self_attn|mlp", METHODS[method](16)),),
        steps=1000,
        batch_size=rows,
        precision="bfloat16",
        quant="nf4" if method.startswith("Q") else None,
        remat=remat,
        attention=attention,
    )
    config = LlamaConfig(**SHAPES[shape], rms_norm_eps=EPS, bos_token_id=1, eos_token_id=(2,))
    return outline(experiment, config, device="tpu")


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--tensor", type=int, default=1, help="chips that share heads and channels; the rest is fsdp")
    parser.add_argument("--shape", default="LLaMA-2-7B", choices=SHAPES)
    parser.add_argument("--methods", default="LoRA,SBoRA-FA,Bone,QLoRA")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--attention", default="splash", choices=("splash", "xla"))
    args = parser.parse_args()
    fsdp = pod_mesh(args.topology, None).size // args.tensor
    mesh = pod_mesh(args.topology, {"fsdp": fsdp, "tensor": args.tensor})
    rows, record = [], {}
    for method in args.methods.split(","):
        began = time.perf_counter()
        outlined = step(args.shape, method, fsdp, args.length, args.remat, args.attention)
        program = compiled(on_mesh(outlined, mesh))
        memory, sent = program.memory_analysis(), collective_bytes(program.as_text())
        seconds = time.perf_counter() - began
        sizes = (memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30)
        cell = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in sorted(sent.items()))
        rows.append([method, *(number(size) for size in sizes), cell, number(seconds, 0)])
        record[method] = {"argument_gib": sizes[0], "temp_gib": sizes[1], "sent_bytes": sent}
        print(rows[-1], flush=True)
    layout = f"fsdp {fsdp} x tensor {args.tensor}, {fsdp} rows of {args.length}"
    heading = f"{args.shape} on {args.topology}, {layout}, attention by {args.attention}"
    show(heading, ["method", "arguments GiB a chip", "temporaries GiB a chip", "sent GiB a chip", "compile s"], rows)
    about = {"date": datetime.date.today().isoformat(), "tpu": heading, "versions": {"jax": version("jax")}}
    with RESULTS.open("a") as file:
        file.write(json.dumps(rounded({**about, "rows": record})) + "\n")


if __name__ == "__main__":
    main()
