"""The mesh of a step, and settings with which it fits, from formulas: nothing is compiled."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from sborax.adapters.constraints import AXES, EXPERT, ROWS, SHARED
from sborax.errors import SboraxError
from sborax.layout.mesh import abstract_mesh
from sborax.models.decoder import DecoderConfig, count_experts, expert_rows
from sborax.models.sharding import is_expert
from sborax.plans.ahead import Outline, argument_bytes, on_mesh, outline
from sborax.plans.estimate import temporary_bytes
from sborax.plans.roofline import Chip, sums_gathers
from sborax.train.experiment import Experiment
from sborax.train.figures import model_flops


def held_bytes(planned: Outline) -> int:
    """Bytes that a step holds on each device: its arguments, and temporaries by the formula."""
    return sum(argument_bytes(planned).values()) + temporary_bytes(planned)


def gathered_bytes(planned: Outline) -> dict[int, float]:
    """The bytes of kernels that a device gathers in a pass, as they are stored, by how many devices gather together.

    kernels / tensor between fsdp x expert, kernels of experts / expert between fsdp x tensor
    """
    assert planned.mesh is not None
    sizes, gathered = planned.mesh.shape, {}
    for path, leaf in planned.parts.base.items():
        axis, unused = (EXPERT, SHARED) if is_expert(path) else (SHARED, EXPERT)
        devices = sizes["fsdp"] * sizes[unused]
        if path.endswith("/kernel") and devices > 1:
            stored = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(leaf))
            gathered[devices] = gathered.get(devices, 0) + stored / sizes[axis]
    return gathered


def link_bytes(planned: Outline, torus: Sequence[int] = ()) -> float:
    """An estimate of the bytes that reach each device from others.

    For each microbatch, with states = passes x layers x tokens of a device x hidden size x bytes of a value:
      2 x `gathered_bytes`: forward and backward; twice that for kernels whose gathers are sent as all-reduces
      + 4 x states, if projections are shared along tensor: two sums a layer
      + 2 x states x (expert - 1) / tensor, if experts are cut along expert: tokens gathered, and outputs summed; with a
        capacity of experts, `expert_rows` x (expert - 1) / expert takes the place of (expert - 1)
    Once a step, 12 for each trained parameter: gathered twice in bfloat16, and summed once in float32

    - torus: the chips along each dimension of a TPU slice; by default no gather is an all-reduce.
    """
    assert planned.mesh is not None
    sizes, config = planned.mesh.shape, planned.model.config
    accumulate, rows, length = planned.batch["tokens"].shape
    tokens = rows * length / math.prod(sizes[name] for name in ROWS)
    gathered = sum(
        2 * size * (2 if sums_gathers(torus, devices) else 1) for devices, size in gathered_bytes(planned).items()
    )
    passes = 3 if planned.model.module.remat == "full" else 2
    states = passes * config.num_hidden_layers * tokens * config.hidden_size * planned.model.module.dtype.itemsize
    shared = 4 * states if sizes[SHARED] > 1 else 0
    capacity = planned.model.module.expert_capacity
    copies = 1 if capacity is None else expert_rows(config, sizes[EXPERT], capacity) / sizes[EXPERT]
    exchanged = 2 * states * copies * (sizes[EXPERT] - 1) / sizes[SHARED]
    return accumulate * (gathered + shared + exchanged) + 12 * planned.parts.count


def meshes(planned: Outline, torus: Sequence[int]) -> Iterator[tuple[dict[str, int], Outline]]:
    """Every mesh fsdp x tensor of a slice that divides rows, heads and leaves, with the step laid out on it.

    Models with experts get every mesh fsdp x expert x tensor, in the order of tensor, then of expert. A mesh on which
    gathers would be all-reduces is followed by meshes with a data axis along one dimension of the torus, on which
    kernels are gathered along the others.

    - torus: the chips along each dimension.
    """
    devices, experts = math.prod(torus), count_experts(planned.model.config)
    for tensor in _divisors(devices):
        for expert in _divisors(math.gcd(devices // tensor, experts)) if experts else [1]:
            for data in (1, *sorted(set(torus))):
                sizes = {"data": data, "fsdp": devices // tensor // expert // data, EXPERT: expert, "tensor": tensor}
                if data * sizes["fsdp"] * expert * tensor != devices:
                    continue
                if not experts:
                    del sizes[EXPERT]
                if data == 1:
                    del sizes["data"]
                try:
                    laid = on_mesh(planned, abstract_mesh(sizes))
                except SboraxError:
                    continue
                yield sizes, laid
                if not sums_kernels(laid, torus):
                    break


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def sums_kernels(planned: Outline, torus: Sequence[int]) -> bool:
    """Whether a step on a mesh has kernels sent as all-reduces.

    - torus: the chips along each dimension of the slice.
    """
    return any(sums_gathers(torus, devices) for devices in gathered_bytes(planned))


def best_mesh(planned: Outline, torus: Sequence[int], chip: Chip) -> dict[str, int]:
    """The mesh with the smallest tensor axis, then the smallest expert axis, on which a step fits and receives bytes in
    no more time than it computes.

    A mesh on which kernels are sent as all-reduces does not qualify, since no all-reduce overlaps with products. If no
    mesh qualifies, the result is the one on which the step fits and receives the fewest bytes. If the step fits on
    none, it is the one on which the step holds the fewest.

    - planned: the step on one device.
    - torus: the chips along each dimension of the slice.

    Raises SboraxError if no mesh divides the rows and the heads.
    """
    devices, candidates = math.prod(torus), list(meshes(planned, torus))
    accumulate, rows, length = planned.batch["tokens"].shape
    if not candidates:
        raise SboraxError(
            f"mesh: no fsdp x tensor of {devices} devices divides {rows} rows and the heads; try batch_size={devices}"
        )
    fitting = [(sizes, laid) for sizes, laid in candidates if held_bytes(laid) <= chip.memory]
    if not fitting:
        return min(candidates, key=lambda candidate: held_bytes(candidate[1]))[0]
    flops = model_flops(planned.model.config, planned.parts) * accumulate * rows * length / devices
    for sizes, laid in fitting:
        if not sums_kernels(laid, torus) and link_bytes(laid, torus) / chip.links <= flops / chip.flops:
            return sizes
    return min(fitting, key=lambda candidate: link_bytes(candidate[1], torus))[0]


def mending(
    experiment: Experiment, config: DecoderConfig, length: int, sizes: Mapping[str, int], device: str, memory: int
) -> list[str] | None:
    """Changes of an experiment with which its step fits by the formula, as `key=value`; None if none is known.

    They are tried in the order of their cost, each on top of those before: recomputing layers, accumulating rows, an
    NF4 base, no copies along data, sharing projections.
    """
    changes: dict[str, Any] = {}
    devices, expert = math.prod(sizes.get(name, 1) for name in AXES), sizes.get(EXPERT, 1)

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
    shards = math.prod(sizes.get(name, 1) for name in ROWS)
    rows = experiment.batch_size // shards
    if rows > 1:
        changes |= {"batch_size": shards, "accumulate": experiment.accumulate * rows}
        if fits():
            return _words(changes)
    if experiment.quant is None and not experiment.train_base:
        changes["quant"] = "nf4"
        if fits():
            return _words(changes)
    # Without copies along data first.
    least = sizes.get("tensor", 1) + (sizes.get("data", 1) == 1)
    for tensor in (size for size in (1, 2, 4, 8, 16) if devices // expert % size == 0 and size >= least):
        changes["mesh"] = {"fsdp": devices // expert // tensor, EXPERT: expert, "tensor": tensor}
        if expert == 1:
            del changes["mesh"][EXPERT]
        if fits():
            return _words(changes)
    return None


def _words(changes: Mapping[str, Any]) -> list[str]:
    return [mesh_option(value) if name == "mesh" else f"{name}={value}" for name, value in changes.items()]


def mesh_option(sizes: Mapping[str, int]) -> str:
    """A mesh as on the command line: "--mesh data=4,fsdp=64"."""
    return "--mesh " + ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
