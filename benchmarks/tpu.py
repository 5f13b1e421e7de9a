"""The real step, compiled for a TPU slice that need not be there: python -m benchmarks.tpu (needs the package libtpu)

LLaMA-2-7B's shape in bfloat16, LoRA rank 16 and its relatives on all seven linears, 2,048 tokens a row, one row a chip.
Prints bytes on each chip and bytes sent by kind of collective, from the compiled program; nothing runs, and no time is
told. Appends what it measured to benchmarks/results.jsonl.
"""

import argparse
import dataclasses
import datetime
import json
import os
import time
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import sborax as sx
from benchmarks.__main__ import RESULTS, number, rounded, show, version
from benchmarks.hlo import collective_bytes
from benchmarks.ours import METHODS
from benchmarks.shapes import EPS, SHAPES
from sborax.models import LanguageModel, Llama, LlamaConfig
from sborax.models.sharding import AXES, ROWS
from sborax.train.base import quantise_base
from sborax.train.experiment import Optimizer
from sborax.train.optimizer import make_optimizer
from sborax.train.sharding import parts_shardings, state_shardings
from sborax.train.state import Parts, TrainState, take_apart
from sborax.train.step import make_step


def compiled(shape: str, method: str, mesh: Mesh, rows: int, length: int, remat: str, attention: str) -> Any:
    """The step of one method for the devices of `mesh`, from shapes alone."""
    config = LlamaConfig(**SHAPES[shape], rms_norm_eps=EPS, bos_token_id=1, eos_token_id=(2,))
    model = LanguageModel(Llama(config, jnp.dtype("bfloat16"), remat, attention=attention), {}, config, None)

    def made() -> tuple[Any, ...]:
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.abstract())
        params = quantise_base(params, "nf4" if method.startswith("Q") else None)
        parts = take_apart(*sx.attach(jax.random.key(0), params, [("self_attn|mlp", METHODS[method](16))]))
        return parts.adapters, parts.frozen, parts.base, parts.trained_base

    def on(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), tree, where)

    parts = Parts(*jax.eval_shape(made))
    where = parts_shardings(mesh, config, parts)
    parts = Parts(*(on(getattr(parts, f.name), getattr(where, f.name)) for f in dataclasses.fields(parts)))
    tx = make_optimizer(Optimizer(), 1000)
    opt = jax.eval_shape(tx.init, parts.train)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), parts.train, opt)
    shardings = state_shardings(mesh, tx, state)
    sharding = NamedSharding(mesh, PartitionSpec(None, ROWS))
    whole = {"tokens": np.int32, "targets": np.int32, "counts": np.bool_, "segments": np.int32}
    batch = {name: jax.ShapeDtypeStruct((1, rows, length), kind, sharding=sharding) for name, kind in whole.items()}
    step = make_step(model, tx, jax.random.key(1), shardings=shardings)
    with jax.set_mesh(mesh):
        return step.lower(on(state, shardings), parts.frozen, parts.base, batch).compile()


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
    chips = topologies.get_topology_desc(args.topology, "tpu").devices
    fsdp = len(chips) // args.tensor
    mesh = Mesh(np.array(chips).reshape(1, fsdp, args.tensor), AXES, axis_types=(AxisType.Auto,) * 3)
    rows, record = [], {}
    for method in args.methods.split(","):
        began = time.perf_counter()
        program = compiled(args.shape, method, mesh, fsdp, args.length, args.remat, args.attention)
        memory, sent = program.memory_analysis(), collective_bytes(program.as_text())
        seconds = time.perf_counter() - began
        held = (memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30)
        told = ", ".join(f"{kind} {size / 2**30:.2f}" for kind, size in sorted(sent.items()))
        rows.append([method, *(number(size) for size in held), told, number(seconds, 0)])
        record[method] = {"argument_gib": held[0], "temp_gib": held[1], "sent_bytes": sent}
        print(rows[-1], flush=True)
    laid = f"fsdp {fsdp} x tensor {args.tensor}, {fsdp} rows of {args.length}"
    heading = f"{args.shape} on {args.topology}, {laid}, attention by {args.attention}"
    show(heading, ["method", "arguments GiB a chip", "temporaries GiB a chip", "sent GiB a chip", "compile s"], rows)
    about = {"date": datetime.date.today().isoformat(), "tpu": heading, "versions": {"jax": version("jax")}}
    with RESULTS.open("a") as file:
        file.write(json.dumps(rounded({**about, "rows": record})) + "\n")


if __name__ == "__main__":
    main()
