"""A step of a sweep over as many single steps: python -m benchmarks.sweep

Members differ in learning rate and seed, so in what SBoRA indexes. Single steps, the sweep by `lax.map` and the one by
`vmap` are timed in turn in one process, over one base. On a CPU: SmolLM2-135M's shape, 4 x 256 tokens, float32; on a
GPU give --dtype bfloat16 and a larger shape. Prints a table and one line of JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sborax as sx
from benchmarks.shapes import EPS, SHAPES
from sborax.models import LanguageModel, Llama, LlamaConfig
from sborax.train.grid import Sweep
from sborax.train.members import gather, make_sweep_step
from sborax.train.optimizer import make_optimizer
from sborax.train.state import Parts, start, take_apart
from sborax.train.step import make_step

METHODS = {"LoRA": lambda r: sx.LoRA(rank=r), "SBoRA-FA": lambda r: sx.SBoRA(rank=2 * r)}
STEPS = 1000


def prepare(args: argparse.Namespace) -> tuple[LanguageModel, Any, dict[str, np.ndarray]]:
    """A model of random weights and one batch."""
    sizes = SHAPES[args.shape] | ({} if args.layers is None else {"num_hidden_layers": args.layers})
    config = LlamaConfig(**sizes, rms_norm_eps=EPS, bos_token_id=1, eos_token_id=(2,))
    model = LanguageModel(Llama(config, jnp.dtype(args.dtype), "cheap", True), {}, config, None)

    def random(path: Any, leaf: Any) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), sum(map(ord, jax.tree_util.keystr(path))))
        return jax.jit(lambda: (0.02 * jax.random.normal(key, leaf.shape, jnp.bfloat16)).astype(leaf.dtype))()

    params = jax.tree_util.tree_map_with_path(random, model.abstract())
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (1, args.batch, args.length)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=2),
        "counts": np.ones_like(tokens, bool),
        "segments": np.ones_like(tokens),
    }
    return model, params, batch


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a single step and of sweeps of `args.members`, `at_once` one and all, in turn."""
    model, params, batch = prepare(args)
    rules = [("self_attn|mlp", METHODS[args.method](args.rank))]
    plain = sx.Experiment(model="random", data=sx.Data("random"), rules=rules, steps=STEPS)
    seeds = tuple(range(args.members // 2))
    members = Sweep(plain, {"optimizer.lr": (1e-4, 3e-4), "seed_adapter": seeds}).members()
    count = len(members)

    def parts(seed: int) -> Parts:
        return take_apart(params, sx.attach(jax.random.key(seed), params, rules)[1])

    each = [parts(member.experiment.seed_adapter) for member in members]
    base, on_device = each[0].base, jax.device_put(batch)
    tx = make_optimizer(plain.optimizer, STEPS)
    arms = {"single": (make_step(model, tx, jax.random.key(1)), start(each[0], tx), (each[0].frozen, base, on_device))}
    for at_once, name in ((1, "lax.map"), (count, "vmap")):
        crew, state = gather(members, each, STEPS, at_once)
        arms[name] = (make_sweep_step(model, crew), state, (crew.own, crew.shared, base, on_device))
    found: dict[str, Any] = {"members": count, "compile_seconds": {}, "temp_gib": {}, "argument_gib": {}, "seconds": {}}
    running = {}
    for name, (step, state, constants) in arms.items():
        began = time.perf_counter()
        compiled = step.lower(state, *constants).compile()
        found["compile_seconds"][name] = time.perf_counter() - began
        memory = compiled.memory_analysis()
        found["temp_gib"][name] = memory.temp_size_in_bytes / 2**30
        found["argument_gib"][name] = memory.argument_size_in_bytes / 2**30
        state, _ = jax.block_until_ready(compiled(state, *constants))
        running[name] = (compiled, state, constants)
        found["seconds"][name] = []
    for _ in range(args.rounds):
        for name, (compiled, state, constants) in running.items():
            began = time.perf_counter()
            for _ in range(count if name == "single" else 1):
                state, _ = compiled(state, *constants)
            jax.block_until_ready(state)
            found["seconds"][name].append(time.perf_counter() - began)
            running[name] = (compiled, state, constants)
    single = statistics.median(found["seconds"]["single"])
    found["over_single_runs"] = {
        name: statistics.median(seconds) / single for name, seconds in found["seconds"].items() if name != "single"
    }
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=6, help="an even number")
    parser.add_argument("--method", default="SBoRA-FA", choices=METHODS)
    parser.add_argument("--shape", default="SmolLM2-135M", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.members < 2 or args.members % 2:
        parser.error("--members must be even: half of them have one learning rate, half another")
    found = measure(args)
    print(
        f"\nA step of {found['members']} members over {found['members']} single steps, {jax.devices()[0].device_kind}"
    )
    print("\n| members | time | temp GiB | single's | compile s | single's |\n|---|---|---|---|---|---|")
    for name, ratio in found["over_single_runs"].items():
        cells = [found[what][arm] for what in ("temp_gib", "compile_seconds") for arm in (name, "single")]
        print(f"| {name} | {ratio:.3f} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    print(json.dumps(vars(args) | found))


if __name__ == "__main__":
    main()
