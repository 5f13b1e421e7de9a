"""`sborax plan`: what a run would train, and its bytes on and between devices, from the headers of files alone."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from sborax.adapters.constraints import ROWS
from sborax.adapters.paths import kernels, module_path
from sborax.adapters.tree import count_node, nodes
from sborax.cli.columns import aligned
from sborax.cli.layout import with_mesh
from sborax.cli.targets import is_experiment
from sborax.config.codec import override
from sborax.config.documents import read_object
from sborax.data.options import Data
from sborax.errors import SboraxError
from sborax.layout.mesh import abstract_mesh, make_mesh
from sborax.layout.state import parameters
from sborax.methods import LoRA
from sborax.models import abstract, load_config
from sborax.models.decoder import DecoderConfig
from sborax.plans.ahead import Outline, argument_bytes, compiled, on_mesh, outline, pod_mesh
from sborax.plans.estimate import temporary_bytes
from sborax.plans.fit import best_mesh, mending, mesh_option, sums_kernels
from sborax.plans.hlo import collective_bytes, matmul_flops, memory_bytes, overlapped_bytes, scattered_bytes
from sborax.plans.roofline import CHIPS, attention_flops, chip_name, chip_of, received_bytes, roofline, torus_of
from sborax.records.disk import CONFIG
from sborax.records.report import method_line
from sborax.train.experiment import Experiment, load_experiment
from sborax.train.figures import model_flops
from sborax.train.head_loss import CHUNK

AUTO = "auto"
Table = list[tuple[str, ...]]
PROJECTIONS = "self_attn|mlp"
"""The rule of a model that is planned as a run, unless rules are given."""


def show(
    target: str,
    changes: Sequence[str] = (),
    mesh: str | None = None,
    topology: str | None = None,
    length: int | None = None,
) -> str:
    """What an experiment would train, or the modules of a model that rules may match. No weights are read.

    A model with any of the options below is planned as a run with LoRA on every projection and one row for each part
    that the mesh cuts the batch into.

    - target: an experiment, a run or a model.
    - changes: `key=value` for fields of the experiment.
    - mesh: sizes of axes, "fsdp=8,tensor=2", in place of the experiment's. The devices need not exist. "auto" takes the
      mesh that formulas prefer for the topology (`sborax.plans.fit.best_mesh`).
    - topology: a TPU slice to compile the step for, such as "v5e:16x16". It need not exist.
    - length: tokens of a row, at most the model's context; by default the longest that the data may have.

    Raises SboraxError for another target, for a mesh that does not fit, for such a length, and as planning does.
    """
    if topology is not None and not os.environ.get("JAX_PLATFORMS"):
        # This machine's TPU is not needed, and may be busy.
        jax.config.update("jax_platforms", "cpu")
    auto = mesh == AUTO
    if auto and topology is None:
        raise SboraxError(f"--mesh {AUTO}: say for which slice, such as --topology v5e:16x16")
    changes, source = with_mesh(changes, None if auto else mesh), Path(target)
    if source.name == CONFIG and _is_model(source):
        target = str(source.parent)
    elif is_experiment(target):
        experiment = load_experiment(target, changes)
        config = load_config(experiment.model)
        _check_length(length, config)
        sizes = _best(experiment, config, str(topology), length) if auto else experiment.mesh
        return describe_experiment(experiment, config, _mesh(sizes, topology), topology, length)
    config = load_config(target)
    _check_length(length, config)
    if not changes and topology is None and length is None:
        return describe_model(target, config)
    default = Experiment(target, Data(target), ((PROJECTIONS, LoRA()),), steps=1)
    devices = _mesh(override(default, changes).mesh, topology)
    rows = 1 if devices is None else math.prod(devices.shape[axis] for axis in ROWS)
    experiment = override(dataclasses.replace(default, batch_size=rows), changes)
    if auto:
        devices = _mesh(_best(experiment, config, str(topology), length), topology)
    return describe_experiment(experiment, config, devices, topology, length)


def _check_length(length: int | None, config: DecoderConfig) -> None:
    if length is not None and not 1 <= length <= config.context:
        raise SboraxError(f"--length {length}: a row has 1 to {config.context} tokens, the context of the model")


def _best(experiment: Experiment, config: DecoderConfig, topology: str, length: int | None) -> dict[str, int]:
    """The mesh that formulas prefer for the chips of a topology."""
    chip, torus = chip_of(topology), torus_of(topology)
    # libtpu knows which slices there are.
    pod_mesh(topology, None)
    return best_mesh(outline(experiment, config, length, "tpu"), torus, chip)


def _mesh(sizes: dict[str, int] | None, topology: str | None) -> Mesh | AbstractMesh | None:
    """The mesh over the chips of a topology, or over this process's devices; abstract if these are too few."""
    if topology is not None:
        return pod_mesh(topology, sizes)
    if sizes is None:
        return None
    return make_mesh(sizes) if math.prod(sizes.values()) <= len(jax.devices()) else abstract_mesh(sizes)


def _is_model(file: Path) -> bool:
    """Whether a `config.json` is that of a model, rather than of a run."""
    return file.is_file() and "model_type" in read_object(file)


def describe_model(target: str, config: DecoderConfig) -> str:
    """A table of a model's kernels, by the names that rules match."""
    params = abstract(config)
    rows: Table = [("module", "layers", "in x out", "parameters")]
    for path, weight in kernels(params).items():
        rows.append((module_path(path)[0], *_shape(weight.shape), f"{math.prod(weight.shape):,}"))
    return "\n".join([_heading(target, config, params), "", *aligned(rows)])


def describe_experiment(
    experiment: Experiment,
    config: DecoderConfig,
    mesh: Mesh | AbstractMesh | None = None,
    topology: str | None = None,
    length: int | None = None,
) -> str:
    """Tables of the adapted modules with their trainable parameters, the bytes on each device, and the bytes sent."""
    params = abstract(config, experiment.precision)
    planned = outline(experiment, config, length, None if topology is None else "tpu")
    trained_base = planned.parts.trained_base
    trained_base_size = sum(leaf.size for leaf in trained_base.values())
    adapters = nodes(planned.parts.adapters)
    counts = {site.path: count_node(adapters[site.path]) for site in planned.plan.sites}
    rows: Table = [("module", "layers", "in x out", "trainable", "method")]
    for site in planned.plan.sites:
        layers = str(math.prod(site.stack)) if site.stack else "1"
        size = f"{site.shape[0]} x {site.shape[1]}"
        rows.append((module_path(site.path)[0], layers, size, f"{counts[site.path]:,}", method_line(site.method)))
    total, base = sum(counts.values()) + trained_base_size, parameters(params)
    lines = [_heading(experiment.model, config, params), "", *(aligned(rows) if planned.plan.sites else [])]
    if planned.plan.untouched and not experiment.train_base:
        lines += [f"left as they are: {', '.join(sorted({module_path(path)[0] for path in planned.plan.untouched}))}"]
    if trained_base:
        lines += [f"trained in the base itself: {trained_base_size:,} parameters in {len(trained_base)} arrays"]
    lines += [f"trainable: {total:,} parameters, {total / base:.4%} of the base", ""]
    return "\n".join([*lines, *_bytes(planned if mesh is None else on_mesh(planned, mesh), topology)])


def _bytes(planned: Outline, topology: str | None) -> list[str]:
    """The lines on arguments and temporaries of the step on each device, and on what it sends."""
    on, (accumulate, rows, length) = "one device", planned.batch["tokens"].shape
    if planned.mesh is not None:
        cut = " x ".join(f"{axis} {size}" for axis, size in planned.mesh.shape.items() if size > 1) or "not cut"
        on = f"each of {planned.mesh.size} devices ({cut})" if topology is None else f"each chip of {topology} ({cut})"
    batch = f"a step of {rows} x {length} tokens" + (f", {accumulate} times" if accumulate > 1 else "")
    sizes = argument_bytes(planned)
    table: Table = [(label, f"{size:,}") for label, size in [*sizes.items(), ("arguments", sum(sizes.values()))]]
    lines = [f"bytes on {on}, {batch}:"]
    if isinstance(planned.mesh, AbstractMesh):
        table += [("temporaries", f"{temporary_bytes(planned):,}")]
        return [
            *lines,
            *aligned(table),
            "temporaries by a formula, since these devices are not here; arguments exactly",
        ]
    if topology is None:
        program = compiled(planned)
        kind = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        return [*lines, *_compiled(program, table, kind)]
    try:
        program = compiled(planned)
    except jax.errors.JaxRuntimeError as error:
        reason = next((line.strip() for line in str(error).splitlines() if "hbm" in line.lower()), None)
        if reason is None:
            message = " ".join(str(error).splitlines()[:2])[:400]
            raise SboraxError(f"topology {topology}: libtpu does not compile this step: {message}") from error
        mend = _try(planned, topology) if chip_name(topology) in CHIPS else ""
        return [*lines, *aligned(table), f"does not fit: {reason}{mend}"]
    lines += [*_compiled(program, table, topology), ""]
    if chip_name(topology) not in CHIPS:
        return [*lines, f"no least time, nor whether it fits: rates are known of {', '.join(CHIPS)}"]
    return [*lines, *_judged(planned, program, topology)]


def _compiled(program: Any, table: Table, kind: str) -> list[str]:
    """The lines on bytes, from the compiled step."""
    table = [*table, ("temporaries", f"{program.memory_analysis().temp_size_in_bytes:,}")]
    lines = [*aligned(table), f"temporaries as compiled for {kind}; arguments exactly"]
    sent = collective_bytes(program.as_text())
    if sent:
        lines += ["", "results of collectives in a step, bytes on each device:", *aligned(_rows(sent))]
    return lines


def _judged(planned: Outline, program: Any, topology: str) -> list[str]:
    """The least time of a step by the chip's published rates, and whether it fits the chip."""
    chip, config = chip_of(topology), planned.model.config
    accumulate, rows, length = planned.batch["tokens"].shape
    assert planned.mesh is not None
    shards, tensor = math.prod(planned.mesh.shape[axis] for axis in ROWS), planned.mesh.shape["tensor"]
    text, memory = program.as_text(), program.memory_analysis()
    most, width = rows * length // shards // CHUNK, config.num_attention_heads * config.head_dim // tensor
    remat = planned.model.module.remat == "full"
    attention = accumulate * attention_flops(config.num_hidden_layers, width, rows // shards, length, remat)
    sent, hidden = collective_bytes(text), sum(overlapped_bytes(text).values())
    received = received_bytes(sent, 1) + scattered_bytes(text, planned.mesh.size)
    times = roofline(chip, matmul_flops(text, most) + attention, memory_bytes(text, most), received)
    flops = model_flops(config, planned.parts) * accumulate * rows * length / planned.mesh.size
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    seconds = f"{times.compute:.3f} s of computing, {times.memory:.3f} s of HBM, {times.links:.3f} s of ICI"
    share, usage = flops / times.seconds / chip.flops, f"{total / 2**30:.1f} of {chip.memory / 2**30:.0f} GiB"
    behind = [f"{hidden / sum(sent.values()):.0%} of what is sent is sent beside products"] if sent else []
    return [
        *behind,
        *_summed(planned, topology),
        f"least time of a step: the largest of {seconds}",
        f"at most {share:.0%} of the chip's peak, by the model's FLOPs",
        f"fits: {usage}" if total <= chip.memory else f"does not fit: {usage}{_try(planned, topology)}",
    ]


def _summed(planned: Outline, topology: str) -> list[str]:
    """A line on kernels that are sent as all-reduces, and a mesh that gathers them."""
    torus = torus_of(topology)
    if not sums_kernels(planned, torus):
        return []
    sizes = best_mesh(planned, torus, chip_of(topology))
    gathers = not sums_kernels(on_mesh(planned, abstract_mesh(sizes)), torus)
    mend = f"; try {mesh_option(sizes)}" if gathers else ""
    return [f"kernels are sent as all-reduces, since they are cut over all dimensions of the torus{mend}"]


def _try(planned: Outline, topology: str) -> str:
    """What to change so that the step fits, by formulas."""
    assert planned.mesh is not None
    memory, length = chip_of(topology).memory, planned.batch["tokens"].shape[-1]
    experiment, config = planned.prepared.experiment, planned.model.config
    words = mending(experiment, config, length, dict(planned.mesh.shape), "tpu", memory)
    return f"; try {' '.join(words)}" if words else "; take a larger slice"


def _rows(sent: dict[str, int]) -> Table:
    return [(kind, f"{size:,}") for kind, size in sorted(sent.items())]


def _heading(source: str, config: DecoderConfig, params: Any) -> str:
    return (
        f"{source}: {config.model_type}, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"context {config.context}, {parameters(params):,} parameters"
    )


def _shape(shape: tuple[int, ...]) -> tuple[str, str]:
    return str(math.prod(shape[:-2])), f"{shape[-2]} x {shape[-1]}"
