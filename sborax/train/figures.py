"""Metrics of a step other than its loss: speed, share of the device's peak, memory, and norms by method."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from sborax.adapters.core import AbstractComposite, AbstractMethod
from sborax.adapters.paths import stacks_experts
from sborax.adapters.tree import nodes
from sborax.layout.state import Parts
from sborax.models.decoder import DecoderConfig, active_share
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
"""Dense bfloat16 TFLOP/s of a JAX device by its kind, from the makers' data sheets; for TPU v2 and v3 of one core."""

BASE = "base"
"""The group under which norms of trained base leaves are summed up."""


def model_flops(config: DecoderConfig, parts: Parts) -> float:
    """FLOPs of the model for each token of a step, without those of attention.

    N counts the entries of every kernel that a token passes, and of the head: 2N forward, 2N back to the activations,
    and 2N more for the weights if the base is trained; 4N or 6N.
    """
    leaves, share = {**parts.base, **parts.trained_base}, active_share(config)
    sizes = {path: math.prod(leaf.shape) * (share if stacks_experts(path) else 1) for path, leaf in leaves.items()}
    kernels = {path: size for path, size in sizes.items() if path.split("/")[-1] == "kernel"}
    if config.tie_word_embeddings:
        kernels[TABLE] = sizes[TABLE]
    trained = sum(size for path, size in kernels.items() if path in parts.trained_base)
    return 4.0 * sum(kernels.values()) + 2.0 * trained


def label(method: AbstractMethod) -> str:
    """The group under which norms of a method's adapters are summed up: its class, with those of its members."""
    if isinstance(method, AbstractComposite):
        return f"{type(method).__name__}({', '.join(dict.fromkeys(label(part) for part in method.members))})"
    return type(method).__name__


@dataclasses.dataclass(frozen=True)
class Figures:
    """Computes metrics of a run from the numbers of its steps.

    - groups: the group of every adapter and trained leaf, by path.
    - flops: of the model, for each token.
    - peak: FLOP/s of all devices together; None for a device whose peak is not known.
    """

    groups: Mapping[str, str]
    flops: float
    peak: float | None

    def of(self, numbers: Mapping[str, Any], tokens: int, seconds: float) -> dict[str, Any]:
        """The metrics of one step, for `metrics.jsonl`.

        - tokens_per_second: without padding.
        - utilisation: the model's FLOPs for these tokens over the peak's; left out if that is not known.
        - memory: peak so far, in bytes: of the device if it reports it, else of this process.
        - update_norm: of what the optimiser adds.
        - methods: norms of gradients and updates by method.
        """
        rate = tokens / seconds
        metrics: dict[str, Any] = {"tokens_per_second": round(rate, 1)}
        if self.peak is not None:
            metrics["utilisation"] = round(rate * self.flops / self.peak, 4)
        metrics["memory"] = peak_memory()
        metrics["update_norm"] = numbers["update_norm"]
        grads, updates = (self._by_group(numbers[name]) for name in ("grad_norms", "update_norms"))
        metrics["methods"] = {
            group: {"grad_norm": grads[group], "update_norm": updates[group]} for group in sorted(updates)
        }
        return metrics

    def _by_group(self, norms: Mapping[str, float]) -> dict[str, float]:
        members: dict[str, list[float]] = {}
        for path, norm in norms.items():
            members.setdefault(self.groups[path], []).append(norm)
        return {group: math.hypot(*values) for group, values in members.items()}


def figures(config: DecoderConfig, parts: Parts, devices: int) -> Figures:
    """The metrics of a run over `devices` devices of the first one's kind."""
    adapters = {path: label(node.method) for path, node in nodes(parts.adapters).items()}
    peak = PEAKS.get(jax.devices()[0].device_kind)
    groups = adapters | dict.fromkeys(parts.trained_base, BASE)
    return Figures(groups, model_flops(config, parts), None if peak is None else peak * 1e12 * devices)
