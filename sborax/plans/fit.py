"""The mesh of a step, and settings with which it fits, from formulas: nothing is compiled."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from sborax.errors import SboraxError
from sborax.layout.mesh import abstract_mesh
from sborax.models.decoder import DecoderConfig
from sborax.plans.ahead import Outline, argument_bytes, on_mesh, outline
from sborax.plans.estimate import temporary_bytes
from sborax.plans.roofline import Chip
from sborax.train.experiment import Experiment
from sborax.train.figures import model_flops


def held_bytes(planned: Outline) -> int:
    """Bytes that a step holds on each device: its arguments, and temporaries by the formula."""
    return sum(argument_bytes(planned).values()) + temporary_bytes(planned)


def link_bytes(planned: Outline) -> float:
    """An estimate of the bytes that reach each device from others.

    2 x kernels as they are stored / tensor, if they are cut along fsdp: gathered forward and backward
    + passes x 4 x layers x tokens of a device x hidden size, if projections are shared along tensor: two sums a layer
    + 12 for each trained parameter: gathered twice in bfloat16, and summed once in float32
    """
    assert planned.mesh is not None
    sizes, config = planned.mesh.shape, planned.model.config
    accumulate, rows, length = planned.batch["tokens"].shape
    tokens = rows * length / (sizes["data"] * sizes["fsdp"])
    stored = [leaf for path, leaf in planned.parts.base.items() if path.endswith("/kernel")]
    kernels = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored))
    passes = 3 if planned.model.module.remat == "full" else 2
    gathered = 2 * kernels / sizes["tensor"] if sizes["fsdp"] > 1 else 0
    shared = passes * 4 * config.num_hidden_layers * tokens * config.hidden_size * planned.model.module.dtype.itemsize
    return accumulate * (gathered + (shared if sizes["tensor"] > 1 else 0)) + 12 * planned.parts.count


def meshes(planned: Outline, devices: int) -> Iterator[tuple[dict[str, int], Outline]]:
    """Every mesh fsdp x tensor of so many devices that divides rows, heads and leaves, with the step laid out on it."""
    for tensor in (size for size in range(1, devices + 1) if devices % size == 0):
        sizes = {"fsdp": devices // tensor, "tensor": tensor}
        try:
            yield sizes, on_mesh(planned, abstract_mesh(sizes))
        except SboraxError:
            continue


def best_mesh(planned: Outline, devices: int, chip: Chip) -> dict[str, int]:
    """The mesh with the smallest tensor axis on which a step fits, and receives bytes no longer than it computes.

    If there is none, that on which it fits and receives least; if it fits on none, that on which it holds least.

    - planned: the step on one device.

    Raises SboraxError if no mesh divides the rows and the heads.
    """
    candidates = list(meshes(planned, devices))
    accumulate, rows, length = planned.batch["tokens"].shape
    if not candidates:
        raise SboraxError(
            f"mesh: no fsdp x tensor of {devices} devices divides {rows} rows and the heads; try batch_size={devices}"
        )
    fitting = [(sizes, link_bytes(laid)) for sizes, laid in candidates if held_bytes(laid) <= chip.memory]
    if not fitting:
        return min(candidates, key=lambda each: held_bytes(each[1]))[0]
    flops = model_flops(planned.model.config, planned.parts) * accumulate * rows * length / devices
    hidden = [sizes for sizes, received in fitting if received / chip.links <= flops / chip.flops]
    return hidden[0] if hidden else min(fitting, key=lambda each: each[1])[0]


def mending(
    experiment: Experiment, config: DecoderConfig, length: int, sizes: Mapping[str, int], device: str, memory: int
) -> list[str] | None:
    """Changes of an experiment with which its step fits by the formula, as `key=value`; None if none is known.

    They are tried in the order of what they cost: recomputing layers, rows in turn, an NF4 base, sharing projections.
    """
    changes: dict[str, Any] = {}
    devices = sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("tensor", 1)

    def fits() -> bool:
        changed = dataclasses.replace(experiment, **changes)
        try:
            laid = on_mesh(outline(changed, config, length, device), abstract_mesh(changes.get("mesh", sizes)))
        except SboraxError:
            return False
        return held_bytes(laid) <= memory

    if experiment.remat != "full":
        changes["remat"] = "full"
        if fits():
            return _words(changes)
    shards = sizes.get("data", 1) * sizes.get("fsdp", 1)
    rows = experiment.batch_size // shards
    if rows > 1:
        changes |= {"batch_size": shards, "accumulate": experiment.accumulate * rows}
        if fits():
            return _words(changes)
    if experiment.quant is None and not experiment.train_base:
        changes["quant"] = "nf4"
        if fits():
            return _words(changes)
    for tensor in (size for size in (2, 4, 8, 16) if devices % size == 0 and size > sizes.get("tensor", 1)):
        changes["mesh"] = {"fsdp": devices // tensor, "tensor": tensor}
        if fits():
            return _words(changes)
    return None


def _words(changes: Mapping[str, Any]) -> list[str]:
    def text(value: Any) -> str:
        return ",".join(f"{axis}={size}" for axis, size in value.items()) if isinstance(value, dict) else str(value)

    return [f"--mesh {text(value)}" if name == "mesh" else f"{name}={text(value)}" for name, value in changes.items()]
