"""`sborax plan`: what a run would train, hold and send, from the headers of files alone."""

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
from sborax.cli.layout import with_mesh
from sborax.cli.targets import is_experiment
from sborax.config.codec import override
from sborax.config.documents import read_object
from sborax.data.options import Data
from sborax.layout.mesh import abstract_mesh, make_mesh
from sborax.layout.state import parameters
from sborax.methods import LoRA
from sborax.models import abstract, load_config
from sborax.models.decoder import DecoderConfig
from sborax.plans.ahead import Outline, argument_bytes, compiled, on_mesh, outline, pod_mesh
from sborax.plans.estimate import temporary_bytes
from sborax.plans.hlo import collective_bytes
from sborax.records.disk import CONFIG
from sborax.records.report import name
from sborax.train.experiment import Experiment, load_experiment

Rows = list[tuple[str, ...]]
PROJECTIONS = "self_attn|mlp"
"""What a model that is planned as a run has adapted, unless rules are given."""


def show(
    target: str,
    changes: Sequence[str] = (),
    mesh: str | None = None,
    topology: str | None = None,
    length: int | None = None,
) -> str:
    """What an experiment would train, or what in a model a rule may match. No weights are read.

    mesh: sizes of axes, "fsdp=8,tensor=2", in place of the experiment's; the devices need not be there. topology: a
    TPU slice to compile the step for, such as "v5e:16x16". length: tokens of a row. With any of these, or changes, a
    model is planned as a run that has LoRA on every projection, one row a device that rows are dealt out to.
    Raises SboraxError for a target that is neither, for what cannot be laid out, and as planning does.
    """
    if topology is not None and not os.environ.get("JAX_PLATFORMS"):
        # A TPU of this machine is not asked, and may be busy.
        jax.config.update("jax_platforms", "cpu")
    changes, source = with_mesh(changes, mesh), Path(target)
    if source.name == CONFIG and _is_model(source):
        target = str(source.parent)
    elif is_experiment(target):
        experiment = load_experiment(target, changes)
        where = _mesh(experiment.mesh, topology)
        return of_experiment(experiment, load_config(experiment.model), where, topology, length)
    config = load_config(target)
    if not changes and topology is None and length is None:
        return of_model(target, config)
    whole = Experiment(target, Data(target), ((PROJECTIONS, LoRA()),), steps=1)
    where = _mesh(override(whole, changes).mesh, topology)
    rows = 1 if where is None else math.prod(where.shape[axis] for axis in ROWS)
    experiment = override(dataclasses.replace(whole, batch_size=rows), changes)
    return of_experiment(experiment, config, where, topology, length)


def _mesh(sizes: dict[str, int] | None, topology: str | None) -> Mesh | AbstractMesh | None:
    """The mesh over chips of a topology, over this process's devices if they are enough, else over none."""
    if topology is not None:
        return pod_mesh(topology, sizes)
    if sizes is None:
        return None
    return make_mesh(sizes) if math.prod(sizes.values()) <= len(jax.devices()) else abstract_mesh(sizes)


def _is_model(file: Path) -> bool:
    """Whether a `config.json` is that of a model, and not of a run."""
    return file.is_file() and "model_type" in read_object(file)


def of_model(target: str, config: DecoderConfig) -> str:
    """The kernels of a model by the names that rules see."""
    params = abstract(config)
    rows: Rows = [("module", "layers", "in x out", "parameters")]
    for path, weight in kernels(params).items():
        rows.append((module_path(path)[0], *_shape(weight.shape), f"{math.prod(weight.shape):,}"))
    return "\n".join([_about(target, config, params), "", *_table(rows)])


def of_experiment(
    experiment: Experiment,
    config: DecoderConfig,
    mesh: Mesh | AbstractMesh | None = None,
    topology: str | None = None,
    length: int | None = None,
) -> str:
    """The modules matched, their ranks, trainable parameters, bytes on each device, and bytes that a step sends."""
    params = abstract(config, experiment.precision)
    whole = outline(experiment, config, length, None if topology is None else "tpu")
    beside = sum(leaf.size for leaf in whole.parts.trained_base.values())
    found = nodes(whole.parts.adapters)
    counts = {site.path: count_node(found[site.path]) for site in whole.plan.sites}
    rows: Rows = [("module", "layers", "in x out", "trainable", "method")]
    for site in whole.plan.sites:
        layers = str(math.prod(site.stack)) if site.stack else "1"
        size = f"{site.shape[0]} x {site.shape[1]}"
        rows.append((module_path(site.path)[0], layers, size, f"{counts[site.path]:,}", name(site.method)))
    total, base = sum(counts.values()) + beside, parameters(params)
    lines = [_about(experiment.model, config, params), "", *(_table(rows) if whole.plan.sites else [])]
    if whole.plan.untouched and not experiment.train_base:
        lines += [f"left as they are: {', '.join(sorted({module_path(path)[0] for path in whole.plan.untouched}))}"]
    if beside:
        lines += [f"trained in the base itself: {beside:,} parameters in {len(whole.parts.trained_base)} arrays"]
    lines += [f"trainable: {total:,} parameters, {total / base:.4%} of the base", ""]
    return "\n".join([*lines, *_bytes(whole if mesh is None else on_mesh(whole, mesh), topology)])


def _bytes(one: Outline, topology: str | None) -> list[str]:
    """Arguments and temporaries of the step on each device, and what it sends."""
    on, (accumulate, rows, length) = "one device", one.batch["tokens"].shape
    if one.mesh is not None:
        cut = " x ".join(f"{axis} {size}" for axis, size in one.mesh.shape.items() if size > 1) or "not cut"
        on = f"each of {one.mesh.size} devices ({cut})" if topology is None else f"each chip of {topology} ({cut})"
    batch = f"a step of {rows} x {length} tokens" + (f", {accumulate} times" if accumulate > 1 else "")
    held = argument_bytes(one)
    told: Rows = [(what, f"{size:,}") for what, size in [*held.items(), ("arguments", sum(held.values()))]]
    lines = [f"bytes on {on}, {batch}:"]
    if isinstance(one.mesh, AbstractMesh):
        told += [("temporaries", f"{temporary_bytes(one):,}")]
        return [*lines, *_table(told), "temporaries by a formula, for want of these devices; arguments exactly"]
    program = compiled(one)
    told += [("temporaries", f"{program.memory_analysis().temp_size_in_bytes:,}")]
    kind = topology or f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    lines += [*_table(told), f"temporaries as compiled for {kind}; arguments exactly"]
    sent = collective_bytes(program.as_text())
    if sent:
        lines += ["", "results of collectives in a step, bytes on each device:", *_table(_rows(sent))]
    return lines


def _rows(sent: dict[str, int]) -> Rows:
    return [(kind, f"{size:,}") for kind, size in sorted(sent.items())]


def _about(source: str, config: DecoderConfig, params: Any) -> str:
    return (
        f"{source}: {config.model_type}, {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"context {config.context}, {parameters(params):,} parameters"
    )


def _shape(shape: tuple[int, ...]) -> tuple[str, str]:
    return str(math.prod(shape[:-2])), f"{shape[-2]} x {shape[-1]}"


def _table(rows: Rows) -> list[str]:
    """Columns, numbers to the right; the last column is text, or the first only one."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def cell(text: str, width: int) -> str:
        return text.rjust(width) if text.replace(",", "").isdecimal() else text.ljust(width)

    return ["  ".join(cell(text, width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
