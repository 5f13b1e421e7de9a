"""What is told of a step beside its loss: speed, share of the device's peak, memory, and norms by method."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from sborax.adapters.core import AbstractComposite, AbstractMethod
from sborax.adapters.tree import nodes
from sborax.layout.state import Parts
from sborax.models.decoder import DecoderConfig
from sborax.records.report import peak_memory
from sborax.train.outputs import TABLE

PEAKS = {
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
}
"""Dense bfloat16 TFLOP/s of one JAX device by its kind, from the makers' data sheets; of a TPU v2 or v3 one core's."""

BASE = "base"
"""The group of trained leaves of the base."""


def model_flops(config: DecoderConfig, parts: Parts) -> float:
    """FLOPs of the model for each token of a step, attention's own left out.

    2N forward, 2N back to the activations, and, where the base is trained, 2N more for the weights: 4N or 6N, N being
    the entries of every kernel and of the head.
    """
    sizes = {path: math.prod(leaf.shape) for path, leaf in {**parts.base, **parts.trained_base}.items()}
    kernels = {path: size for path, size in sizes.items() if path.split("/")[-1] == "kernel"}
    if config.tie_word_embeddings:
        kernels[TABLE] = sizes[TABLE]
    trained = sum(size for path, size in kernels.items() if path in parts.trained_base)
    return 4.0 * sum(kernels.values()) + 2.0 * trained


def label(method: AbstractMethod) -> str:
    """The name under which the adapters of a method are summed up: its class, and those of its members."""
    if isinstance(method, AbstractComposite):
        return f"{type(method).__name__}({', '.join(dict.fromkeys(label(part) for part in method.members))})"
    return type(method).__name__


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the numbers of a step mean in this run.

    groups: by path of an adapter or trained leaf, what it is summed up with. flops: of the model, for each token.
    peak: FLOP/s of all devices together; None where the device's peak is not known.
    """

    groups: Mapping[str, str]
    flops: float
    peak: float | None

    def of(self, numbers: Mapping[str, Any], tokens: int, seconds: float) -> dict[str, Any]:
        """Figures of one step, for `metrics.jsonl`.

        tokens_per_second: padding left out. utilisation: the model's FLOPs for these tokens over the peak's, only where
        that is known. memory: bytes, the most so far, of the device where it says so, else of this process.
        update_norm: of what the optimiser adds. methods: gradient and update norms by method.
        """
        rate = tokens / seconds
        told: dict[str, Any] = {"tokens_per_second": round(rate, 1)}
        if self.peak is not None:
            told["utilisation"] = round(rate * self.flops / self.peak, 4)
        told["memory"] = peak_memory()
        told["update_norm"] = numbers["update_norm"]
        grads, updates = (self._by_group(numbers[name]) for name in ("grad_norms", "update_norms"))
        told["methods"] = {
            group: {"grad_norm": grads[group], "update_norm": updates[group]} for group in sorted(updates)
        }
        return told

    def _by_group(self, norms: Mapping[str, float]) -> dict[str, float]:
        parts: dict[str, list[float]] = {}
        for path, norm in norms.items():
            parts.setdefault(self.groups[path], []).append(norm)
        return {group: math.hypot(*own) for group, own in parts.items()}


def figures(config: DecoderConfig, parts: Parts, devices: int) -> Figures:
    """The figures of a run over so many devices of the first one's kind."""
    adapters = {path: label(node.method) for path, node in nodes(parts.adapters).items()}
    peak = PEAKS.get(jax.devices()[0].device_kind)
    groups = adapters | dict.fromkeys(parts.trained_base, BASE)
    return Figures(groups, model_flops(config, parts), None if peak is None else peak * 1e12 * devices)
