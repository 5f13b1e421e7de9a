"""One training step of sborax on a model of a given shape, measured in this process."""

import dataclasses
import resource
import statistics
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import sborax as sx
from benchmarks.runner import Runner, in_turn, time_ratio
from benchmarks.shapes import EPS, SHAPES, kernels
from sborax.models import LanguageModel, Llama, LlamaConfig
from sborax.models.backends import choose, platform
from sborax.models.nf4 import quantise
from sborax.train import head_loss

METHODS = {
    "LoRA": lambda r: sx.LoRA(rank=r),
    "SBoRA-FA": lambda r: sx.SBoRA(rank=2 * r),
    "SBoRA-FB": lambda r: sx.SBoRA(rank=2 * r, variant="FB"),
    "Bone": lambda r: sx.Bone(rank=2 * r),
    "Bat": lambda r: sx.Bat(rank=2 * r),
    "DoRA": lambda r: sx.DoRA(rank=r),
    "PiSSA": lambda r: sx.PiSSA(rank=r, niter=4),
    "SARA": lambda r: sx.SARA(rank=r),
    "Mo-SARA": lambda r: sx.MoSARA(rank=r),
    "QLoRA": lambda r: sx.LoRA(rank=r),
    "QSBoRA-FA": lambda r: sx.SBoRA(rank=2 * r),
    "QBone": lambda r: sx.Bone(rank=2 * r),
    "full": lambda r: None,
}
"""Methods by the rank of LoRA. The others train about as many parameters as LoRA, where they can."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration to measure.

    - method: a name in `METHODS`; those that begin with Q have an NF4 base.
    - shape: a name in `SHAPES`.
    - rank: LoRA's rank.
    - modules: the pattern of the adapted modules.
    - batch, length: rows and tokens a row of a batch.
    - documents: segments in a row.
    - dtype: of the base.
    - remat, scan: as in `Llama`.
    - layers: number of layers; None for all of the shape's.
    """

    method: str = "LoRA"
    shape: str = "SmolLM2-135M"
    rank: int = 16
    modules: str = "self_attn|mlp"
    batch: int = 4
    length: int = 256
    documents: int = 1
    dtype: str = "float32"
    remat: str = "cheap"
    scan: bool = True
    layers: int | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """The shape, cut to `layers`."""
        shape = SHAPES[self.shape]
        return shape if self.layers is None else {**shape, "num_hidden_layers": self.layers}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A step and its arguments."""

    step: Any
    state: Any
    parts: Any
    batch: Any

    def lower(self) -> Any:
        """The step, traced."""
        return self.step.lower(self.state, self.parts.frozen, self.parts.base, self.batch)


def plain_model(
    sizes: dict[str, Any], dtype: str = "float32", remat: str = "none", scan: bool = True, attention: str = "auto"
) -> LanguageModel:
    """A model of a given shape, without parameters or tokenizer."""
    config = LlamaConfig(**sizes, rms_norm_eps=EPS, bos_token_id=1, eos_token_id=(2,))
    backend = choose(attention, platform(), dtype, config.head_dim)
    return LanguageModel(Llama(config, jnp.dtype(dtype), remat, scan, attention=backend), {}, config, None)


def random_params(model: LanguageModel, four_bit: bool = False) -> Any:
    """Random parameters of a model. four_bit: quantise the kernels of its layers to NF4."""

    def random(path: Any, leaf: Any) -> Any:
        keys = [part.key for part in path]
        # Drawn on the device, so that a large model never is on the host.
        key = jax.random.fold_in(jax.random.key(0), sum(map(ord, "".join(keys))))

        def draw(shape: tuple[int, ...]) -> Any:
            return jax.jit(lambda: (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(leaf.dtype))()

        if four_bit and keys[0] == "layers" and keys[-1] == "kernel":
            layers = leaf.shape[:-2]
            # One layer's weight in all: the float32 copies of quantisation take several times a weight.
            packed = quantise(draw(leaf.shape[-2:]))
            return jax.tree.map(lambda part: jnp.broadcast_to(part, (*layers, *part.shape)).copy(), packed)
        return draw(leaf.shape)

    return jax.tree_util.tree_map_with_path(random, model.abstract())


def random_batch(case: Case) -> dict[str, Any]:
    """One microbatch in which every token counts, on the device."""
    tokens = np.random.default_rng(0).integers(0, case.sizes["vocab_size"], (1, case.batch, case.length), np.int32)
    segments = 1 + np.arange(case.length, dtype=np.int32) * case.documents // case.length
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=2),
        "counts": np.ones_like(tokens, bool),
        "segments": np.broadcast_to(segments, tokens.shape).copy(),
    }
    return jax.device_put(batch)


def workload(case: Case, params: Any = None) -> Workload:
    """The step of a run, with its adapters and one batch. params: of the base; by default random ones."""
    model = plain_model(case.sizes, case.dtype, case.remat, case.scan)
    if params is None:
        params = random_params(model, case.method.startswith("Q"))
    method = METHODS[case.method](case.rank)
    rules = () if method is None else [(case.modules, method)]
    experiment = sx.Experiment(case.shape, sx.Data("random"), rules, steps=1000, train_base=method is None)
    prepared = sx.prepare(experiment, dataclasses.replace(model, params=params), 1000)
    parts = prepared.adapt(params)
    return Workload(prepared.make_step(), prepared.start(parts), parts, random_batch(case))


def runner(case: Case) -> tuple[Runner, int]:
    """The compiled step, and the number of trained parameters."""
    work = workload(case)
    return Runner.of(work.step, work.state, work.parts.frozen, work.parts.base, work.batch), work.parts.count


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Seconds of every step but the first, facts of the compiled program, and the peak memory."""
    timed, trainable = runner(case)
    timed.seconds()
    seconds = [timed.seconds() for _ in range(steps)]
    return {"seconds": seconds, **timed.compiled_facts(), "trainable": trainable, "peak_gib": peak_gib()}


def pair(case: Case, other: Case, steps: int) -> dict[str, Any]:
    """Seconds of steps of two cases in turn, and the speed of `case` over that of `other`."""
    (timed, trainable), (reference, _) = runner(case), runner(other)
    seconds, other_seconds = in_turn(timed, reference, steps)
    return {
        "seconds": seconds,
        "other_seconds": other_seconds,
        "speed_over_other": time_ratio(other_seconds, seconds),
        **timed.compiled_facts(),
        "trainable": trainable,
    }


def matmul_flops_per_second(case: Case) -> float:
    """The upper bound on speed: the matmul of the largest projection, alone."""
    fan_in, fan_out = max(kernels(case.sizes), key=lambda shape: shape[0] * shape[1])
    x, w = (jnp.ones(shape, case.dtype) for shape in ((case.batch * case.length, fan_in), (fan_in, fan_out)))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, w))
    rounds = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready([product(x, w) for _ in range(10)])
        rounds.append((time.perf_counter() - began) / 10)
    return 2 * x.shape[0] * fan_in * fan_out / statistics.median(rounds)


def unrolled(case: Case, layers: int) -> Any:
    """The compiled step of a few unrolled layers, with cross-entropy in one chunk: a program without loops."""
    with mock.patch.object(head_loss, "CHUNK", case.batch * case.length):
        return workload(dataclasses.replace(case, scan=False, remat="none", layers=layers)).lower().compile()


def flops(case: Case) -> float:
    """FLOPs of the compiled step, from programs of one and two layers: XLA counts the body of a loop once."""
    first, second = (unrolled(case, layers).cost_analysis()["flops"] for layers in (1, 2))
    return first + (case.sizes["num_hidden_layers"] - 1) * (second - first)


def peak_gib() -> float:
    """The peak memory of the device, or on a CPU that of this process."""
    stats = jax.devices()[0].memory_stats()
    if stats and jax.default_backend() != "cpu":
        return stats["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
