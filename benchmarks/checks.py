"""What a device computes, beside the CPU of the same machine: python -m benchmarks.checks

Every method takes a step in a small float32 model on both, from the same adapters. Further checks compare attention,
NF4, donation, a sweep by `vmap`, repeated steps, and adapters that were attached on the device. Each prints its
largest difference and the limit. On a CPU the device is that CPU: most differences are 0, and only the program is
tried.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sborax as sx
from benchmarks.ours import plain_model
from benchmarks.worker import run
from sborax import methods
from sborax.adapters.core import Hint
from sborax.adapters.paths import kernels
from sborax.layout.state import start, take_apart
from sborax.models import LanguageModel
from sborax.models.backends import attend, choose, platform
from sborax.models.nf4 import quantise
from sborax.sweep.grid import Sweep
from sborax.sweep.members import gather, make_sweep_step
from sborax.train.optimizer import make_optimizer
from sborax.train.step import make_step

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TARGETS = "self_attn|mlp"
FLOAT32 = 2e-5
"""Largest difference of float32 results whose sums are added in another order, relative to the largest entry."""
BFLOAT16 = 2e-2
"""The same of results of bfloat16 operands: 2.5 of its rounding steps."""

Check = tuple[str, float, float]
"""What is compared, the difference, and its limit."""


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference of two trees, leaf by leaf, over the largest entry of that leaf."""
    differences = [0.0]
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        left, right = (np.asarray(leaf, np.float32) for leaf in (left, right))
        differences.append(float(np.abs(left - right).max(initial=0) / max(np.abs(right).max(initial=0), 1e-30)))
    # A number that is not finite may not hide behind others.
    return max(differences) if np.all(np.isfinite(differences)) else float("inf")


def differing(ours: Any, theirs: Any) -> float:
    """The number of leaves that are not equal bit for bit."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return float(sum(np.asarray(left).tobytes() != np.asarray(right).tobytes() for left, right in pairs))


def on(device: Any, tree: Any) -> Any:
    """Copies of all arrays on a device."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), device) if is_plain(leaf) else leaf, tree)


def is_plain(leaf: Any) -> bool:
    """Whether numpy holds a leaf: keys of random streams are not plain."""
    return not jnp.issubdtype(getattr(leaf, "dtype", np.dtype(object)), jax.dtypes.prng_key)


def small_model(dtype: str = "float32", attention: str = "xla") -> LanguageModel:
    """The small model, without parameters."""
    return plain_model(SHAPE, dtype, attention=attention)


def small_batch(rows: int = 4, length: int = 32) -> dict[str, Any]:
    """One microbatch with two samples in a row, and padding."""
    tokens = np.random.default_rng(0).integers(1, SHAPE["vocab_size"], (1, rows, length), np.int32)
    segments = np.broadcast_to(np.repeat(np.array([1, 2, 0], np.int32), [12, 16, length - 28]), tokens.shape)
    counts = (segments > 0) & (np.arange(length) % 12 > 3)
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 2), "counts": counts, "segments": segments.copy()}


def small_params(model: LanguageModel) -> Any:
    """Random parameters in numpy, the same on every device."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype), model.abstract()
    )  # fmt: skip


def attached(name: str, params: Any) -> tuple[Any, Any]:
    """The base and the adapters of a method with its defaults, on the default device."""
    rng = np.random.default_rng(1)
    hints = {
        path.removesuffix("/kernel"): Hint(grad=jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32))
        for path, leaf in kernels(params).items()
    }
    return sx.attach(jax.random.key(2), params, [(TARGETS, getattr(methods, name)())], hints=hints)


def moved(adapters: Any) -> Any:
    """Adapters whose trained leaves have moved from their start."""
    train, frozen = sx.split(adapters)
    leaves, structure = jax.tree.flatten(train)
    rng = np.random.default_rng(3)
    changed = [leaf + 0.02 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return sx.combine(jax.tree.unflatten(structure, changed), frozen)


def gradients(model: LanguageModel, base: Any, adapters: Any, device: Any, times: int = 1) -> list[dict[str, Any]]:
    """The loss and the gradient of the adapters, by one program on a device that runs `times`."""
    parts = take_apart(base, adapters)
    train, frozen, flat, batch = (on(device, tree) for tree in (parts.train, parts.frozen, parts.base, small_batch()))
    runs = []
    with jax.default_device(device):
        call = jax.jit(functools.partial(sx.forward_backward, model))
        for _ in range(times):
            sums, grads = call(train, frozen, flat, batch, jax.random.key(4))
            runs.append({"loss": sums.losses, "grads": grads["adapters"]})
    return runs


def check_method(name: str) -> Iterator[Check]:
    """A method's step beside the CPU's, repeated on the device, and its adapters as attached on the device."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    model = small_model()
    with jax.default_device(cpu):
        params = small_params(model)
        base, adapters = attached(name, params)
        adapters = moved(adapters)
    (expected,) = gradients(model, base, adapters, cpu)
    ours, second = gradients(model, base, adapters, device, times=2)
    yield "step", relative(ours, expected), FLOAT32
    yield "the step again", differing(second, ours), 0.0
    method = getattr(methods, name)
    with jax.default_device(device):
        placed, fresh = attached(name, on(device, params))
        if method.identity_at_init and not method.no_merge:
            merged = jax.jit(sx.merge)(placed, fresh)
            yield "merged at its start", relative(merged, params), FLOAT32


def check_donation() -> Iterator[Check]:
    """The state before a step is given up for the one behind it."""
    model = small_model()
    base, adapters = attached("LoRA", small_params(model))
    parts, tx = take_apart(base, adapters), make_optimizer(sx.Optimizer(lr=1e-3), 10)
    state = start(parts, tx)
    make_step(model, tx, jax.random.key(5))(state, parts.frozen, parts.base, small_batch())
    count = sum(not leaf.is_deleted() for leaf in jax.tree.leaves(state.train["adapters"]))
    yield "leaves that were not donated", float(count), 0.0


def check_attention() -> Iterator[Check]:
    """The device's attention beside XLA's in float32, on packed and on plain rows, with gradients."""
    name = choose("auto", platform(), "bfloat16", 64)
    rng = np.random.default_rng(0)
    for heads, head_dim, length in ((4, 64, 256), (4, 128, 512), (4, 64, 77)):
        shapes = ((3, length, count, head_dim) for count in (heads, 2, 2, heads))
        inputs = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
        cut = length // 3
        rows = [[1] * length, [1] * cut + [2] * (length - cut), [1] * cut + [2] * cut + [0] * (length - 2 * cut)]
        for segments in (None, jnp.asarray(rows, jnp.int32)):
            mask = jnp.ones((3, length), bool) if segments is None else segments > 0

            def total(query: Any, key: Any, value: Any, slope: Any, by: str, segments: Any, mask: Any) -> Any:
                out = attend(by, query, key, value, segments, segments)
                # What padding attends to is nobody's concern.
                masked = jnp.where(mask[:, :, None, None], out.astype(jnp.float32), 0.0)
                return jnp.sum(masked * slope.astype(jnp.float32)), masked

            call = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True), static_argnums=4)
            (_, out), grads = call(*inputs, name, segments, mask)
            exact = [leaf.astype(jnp.float32) for leaf in inputs]
            (_, expected), slopes = call(*exact, "xla", segments, mask)
            kind = f"{name}, heads of {head_dim}, {length} tokens, {'packed' if segments is not None else 'plain'}"
            yield f"{kind}: output", relative(out, expected), BFLOAT16
            yield f"{kind}: gradients", relative(grads, slopes), BFLOAT16


def check_nf4() -> Iterator[Check]:
    """Codes and dequantised weights, bit for bit, and products."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((2, 512, 320)).astype(np.float32)
    x = rng.standard_normal((33, 512)).astype(np.float32)
    results = []
    for place in (cpu, device):
        with jax.default_device(place):
            packed = jax.jit(quantise)(jax.device_put(weight, place))
            dense = jax.jit(lambda packed: packed.dense())(packed)
            lower = jax.tree.map(lambda leaf: leaf[0], packed)
            product = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(w.rmatmul(x) ** 2)))
            results.append((packed, dense, product(jax.device_put(x, place), lower)))
    (packed, dense, product), (ours, our_dense, our_product) = results
    yield "codes and scales", differing(ours, packed), 0.0
    yield "dequantised weights", differing(our_dense, dense), 0.0
    yield "product and its gradient", relative(our_product, product), FLOAT32


def check_sweep() -> Iterator[Check]:
    """Three steps of four members at once, beside as many single runs."""
    model, batch = small_model(), small_batch()
    params = small_params(model)
    rules = [(TARGETS, sx.SBoRA(rank=8))]
    plain = sx.Experiment(model="random", data=sx.Data("random"), rules=rules, steps=10)
    planned = Sweep(plain, {"optimizer.lr": (1e-4, 3e-4), "seed_adapter": (0, 1)}).members()
    parts = [
        take_apart(params, sx.attach(jax.random.key(member.experiment.seed_adapter), params, rules)[1])
        for member in planned
    ]
    stacked, state = gather(planned, parts, 10, len(planned))
    together = make_sweep_step(model, stacked)
    singles = []
    for member, part in zip(planned, parts, strict=True):
        tx = make_optimizer(member.experiment.optimizer, 10)
        step = make_step(model, tx, jax.random.key(1))
        single = start(part, tx)
        for _ in range(3):
            single, _ = step(single, part.frozen, part.base, batch)
        singles.append(single.train)
    for _ in range(3):
        state, _ = together(state, stacked.constants, stacked.shared, take_apart(params, {}).base, batch)
    # The singles have donated parts that the sweep does not share.
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *singles)
    # AdamW divides gradients by their size, those too that are rounding alone.
    yield "adapters after three steps", relative(state.run.train, expected), 1e-2


def check_bfloat16() -> Iterator[Check]:
    """A step of LoRA in bfloat16 with the attention of the device, beside float32 on the CPU."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    narrow = small_model("bfloat16", "auto")
    with jax.default_device(cpu):
        params = small_params(narrow)
        base, adapters = attached("LoRA", params)
        adapters = moved(adapters)
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base)
    (expected,) = gradients(small_model(), wide, adapters, cpu)
    (ours,) = gradients(narrow, base, adapters, device)
    yield "loss", relative(ours["loss"], expected["loss"]), BFLOAT16
    yield "gradients", relative(ours["grads"], expected["grads"]), 5 * BFLOAT16


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "attention": check_attention,
    "nf4": check_nf4,
    "donation": check_donation,
    "sweep": check_sweep,
    "bfloat16": check_bfloat16,
}


def results(names: list[str]) -> dict[str, Any]:
    """The checks of some subjects: names of methods or of `CHECKS`. A subject that fails has its error."""
    outcomes: dict[str, Any] = {}
    for name in names:
        try:
            # TensorFloat-32, a GPU's default for float32, has 10 bits.
            with jax.default_matmul_precision("highest"):
                outcomes[name] = list(CHECKS[name]() if name in CHECKS else check_method(name))
        except Exception as error:  # every subject is reported
            outcomes[name] = f"{type(error).__name__}: {str(error)[:400]}"
    return outcomes


def check(workers: int, names: list[str]) -> dict[str, Any]:
    """The checks of all subjects, in several processes on one device."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    slices = [names[number::workers] for number in range(workers)]
    outcomes: dict[str, Any] = {}
    with ThreadPoolExecutor(workers) as pool:
        for part in pool.map(lambda subjects: run(what="checks", names=subjects), filter(None, slices)):
            outcomes |= part
    return {name: outcomes[name] for name in names}


def failures(outcomes: dict[str, Any]) -> list[str]:
    """One line for every check over its limit, and for every subject that raised."""
    lines = []
    for subject, checks in outcomes.items():
        if isinstance(checks, str):
            lines.append(f"{subject}: {checks}")
            continue
        # `not <=` is true for what is not a number, too.
        lines += [f"{subject}, {name}: {value:.3g} > {limit:g}" for name, value, limit in checks if not value <= limit]
    return lines


def main() -> None:
    """Run and print all checks; exit with 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--only", default=";".join([*CHECKS, *methods.__all__]), help="subjects, by semicolons")
    args = parser.parse_args()
    outcomes = check(args.workers, args.only.split(";"))
    print(json.dumps(outcomes))
    lines = failures(outcomes)
    print("\n".join([*lines, f"{len(outcomes)} subjects, {len(lines)} failed"]))
    raise SystemExit(bool(lines))


if __name__ == "__main__":
    main()
