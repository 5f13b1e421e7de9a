"""One training step of sborax beside PEFT's: python -m benchmarks.step

SmolLM2-135M's shape with random weights (speed does not depend on their values), LoRA r = 16 on all seven linears,
batches of 4 x 256 tokens, float32, AdamW, two threads each. Each peer runs in processes of its own, in turn, so that
drift of the machine's speed meets both; the ratio is that of the medians. Appends one JSON line to
benchmarks/results.jsonl.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
BATCH, LENGTH, RANK, THREADS = 4, 256, 16, 2
RESULTS = Path(__file__).parent / "results.jsonl"


def sborax_step(method: str, steps: int, remat: str, scan: bool) -> dict[str, float]:
    """Seconds of every step, peak memory, cold compile time, and compiled FLOPs over the least possible."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=1"
    import jax
    import jax.numpy as jnp
    import numpy as np

    import sborax as sx
    from sborax.models import LanguageModel, Llama, LlamaConfig
    from sborax.train.experiment import Optimizer
    from sborax.train.optimizer import make_optimizer
    from sborax.train.state import start, take_apart
    from sborax.train.step import make_step

    methods = {
        "LoRA": sx.LoRA(rank=RANK),
        "SBoRA-FA": sx.SBoRA(rank=RANK * 2),
        "SBoRA-FB": sx.SBoRA(rank=RANK * 2, variant="FB"),
        "Bone": sx.Bone(rank=RANK * 2),
        "Bat": sx.Bat(rank=32),
        "DoRA": sx.DoRA(rank=RANK),
        "PiSSA": sx.PiSSA(rank=RANK, niter=4),
    }

    def prepare(layers: int, scan: bool):
        shape = {**SHAPE, "num_hidden_layers": layers}
        config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=(2,))
        model = LanguageModel(Llama(config, jnp.dtype("float32"), remat=remat, scan=scan), {}, config, None)
        leaves, treedef = jax.tree.flatten(model.abstract())
        rng = np.random.default_rng(0)
        random = [jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32)) for leaf in leaves]
        params, adapters = sx.attach(
            jax.random.key(0), jax.tree.unflatten(treedef, random), [("self_attn|mlp", methods[method])]
        )
        parts = take_apart(params, adapters)
        tx = make_optimizer(Optimizer(), 1000)
        tokens = rng.integers(0, SHAPE["vocab_size"], (1, BATCH, LENGTH)).astype(np.int32)
        batch = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=2),
            "counts": np.ones_like(tokens, bool),
            "segments": np.ones_like(tokens),
        }
        return make_step(model, tx, jax.random.key(1)), start(parts, tx), parts, batch

    step, state, parts, batch = prepare(SHAPE["num_hidden_layers"], scan)
    began = time.perf_counter()
    compiled = step.lower(state, parts.frozen, parts.base, batch).compile()
    compile_seconds = time.perf_counter() - began
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, numbers = compiled(state, parts.frozen, parts.base, batch)
        jax.block_until_ready(numbers["loss"])
        seconds.append(time.perf_counter() - began)
    assert np.isfinite(float(numbers["loss"]))
    return {
        "seconds": seconds[1:],
        "compile_seconds": compile_seconds,
        "temp_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "peak_gib": peak_gib(),
        "trainable": parts.count,
    }


def flops_over_minimum() -> float:
    """FLOPs of the compiled LoRA step over 4N + attention + adapter, from unrolled programs of 1 and 2 layers.

    XLA counts the body of a loop once, so the stack is unrolled and the cross-entropy is one chunk.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import sborax as sx
    from sborax.models import LanguageModel, Llama, LlamaConfig
    from sborax.train import loss
    from sborax.train.experiment import Optimizer
    from sborax.train.optimizer import make_optimizer
    from sborax.train.state import start, take_apart
    from sborax.train.step import make_step

    tokens = BATCH * LENGTH
    loss.frozen_head_loss.__wrapped__.__defaults__ = (tokens,)

    def compiled(layers: int) -> float:
        config = LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}, bos_token_id=1, eos_token_id=(2,))
        model = LanguageModel(Llama(config, jnp.dtype("float32"), scan=False), {}, config, None)
        params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.abstract())
        params, adapters = sx.attach(jax.random.key(0), params, [("self_attn|mlp", sx.LoRA(rank=RANK))])
        parts, tx = take_apart(params, adapters), make_optimizer(Optimizer(), 1000)
        step = make_step(model, tx, jax.random.key(1))
        whole = np.ones((1, BATCH, LENGTH), np.int32)
        batch = {"tokens": whole, "targets": whole, "counts": whole.astype(bool), "segments": whole}
        return step.lower(start(parts, tx), parts.frozen, parts.base, batch).compile().cost_analysis()["flops"]

    one, two = compiled(1), compiled(2)
    total = one + (SHAPE["num_hidden_layers"] - 1) * (two - one)
    return total / minimum_flops()


def minimum_flops() -> float:
    """Two passes over the base (forward, gradient in x), three over attention and over the factors."""
    tokens, d, f = BATCH * LENGTH, SHAPE["hidden_size"], SHAPE["intermediate_size"]
    q, kv = SHAPE["num_attention_heads"] * SHAPE["head_dim"], SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    shapes = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
    base = sum(i * o for i, o in shapes)
    adapter = sum(RANK * (i + o) for i, o in shapes)
    attention = 3 * 2 * 2 * BATCH * LENGTH * LENGTH * q
    layer = 4 * base * tokens + 6 * adapter * tokens + attention
    return SHAPE["num_hidden_layers"] * layer + 4 * d * SHAPE["vocab_size"] * tokens


def peft_step(steps: int) -> dict[str, float]:
    """The same step in PEFT on transformers, eager, with SDPA attention."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    tokens = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))
    model.train()
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "peak_gib": peak_gib(), "trainable": sum(p.numel() for p in trained)}


def peak_gib() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(arguments: list[str]) -> dict:
    """One worker in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-m", "benchmarks.step", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run the peers in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each peer")
    parser.add_argument("--methods", default="LoRA", help="comma-separated methods of ours")
    parser.add_argument("--remat", default="cheap")
    parser.add_argument("--unrolled", action="store_true", help="our layers one after the other instead of scanned")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "peft":
        print(json.dumps(peft_step(args.steps)))
    elif args.worker == "flops":
        print(json.dumps(flops_over_minimum()))
    elif args.worker:
        print(json.dumps(sborax_step(args.worker, args.steps, args.remat, not args.unrolled)))
    else:
        table(args)


def table(args: argparse.Namespace) -> None:
    """Measure, print, and keep the record."""
    methods = args.methods.split(",")
    common = ["--steps", str(args.steps), "--remat", args.remat] + ["--unrolled"] * args.unrolled
    rows: dict[str, list[dict]] = {name: [] for name in ["peft", *methods]}
    for _ in range(args.rounds):
        for name, found in rows.items():
            found.append(run(["--worker", name, *common]))
    ratio = run(["--worker", "flops"])
    tokens = BATCH * LENGTH
    record = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "remat": args.remat,
        "scan": not args.unrolled,
        "flops_over_minimum": round(ratio, 4),
        "rows": {},
    }
    print(f"{'':12} {'tokens/s':>9} {'over PEFT':>9} {'peak GiB':>9} {'temp GiB':>9} {'compile s':>9} {'trained':>10}")
    speeds = {
        name: tokens / statistics.median(s for row in found for s in row["seconds"]) for name, found in rows.items()
    }
    for name, found in rows.items():
        row = {"tokens_per_second": speeds[name], "over_peft": speeds[name] / speeds["peft"]}
        row |= {key: max(part[key] for part in found) for key in found[0] if key != "seconds"}
        record["rows"][name] = {key: round(value, 4) for key, value in row.items()}
        cells = [f"{row[key]:9.2f}" if key in row else " " * 9 for key in ("peak_gib", "temp_gib", "compile_seconds")]
        print(f"{name:12} {speeds[name]:9.1f} {row['over_peft']:9.3f} {' '.join(cells)} {row['trainable']:10,}")
    print(f"compiled FLOPs of the LoRA step over 4N + attention + adapter: {ratio:.3f}")
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
