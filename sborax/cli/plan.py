"""`sborax plan`: what a run would train and hold, from the headers of files alone."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sborax.cli.targets import is_experiment
from sborax.core import Hint, SboraxError
from sborax.models import LlamaConfig, abstract, load_config
from sborax.paths import Plan, Site, kernels, module_path, plan
from sborax.procedures import Run
from sborax.train.base import adapt
from sborax.train.experiment import Experiment, load_experiment
from sborax.train.hints import promised
from sborax.train.optimizer import make_optimizer
from sborax.train.report import name
from sborax.train.state import parameters, start, take_apart
from sborax.tree import count_node, nodes

Rows = list[tuple[str, ...]]


def show(target: str, changes: Sequence[str] = ()) -> str:
    """What an experiment would train, or what in a model a rule may match. No weights are read.

    Raises SboraxError for a target that is neither, and as planning does.
    """
    if is_experiment(target):
        return of_experiment(load_experiment(target, changes))
    if changes:
        raise SboraxError(f"{changes[0]}: {target} is a model, which has no fields to change; give an experiment")
    return of_model(target)


def of_model(target: str) -> str:
    """The kernels of a model by the names that rules see."""
    config = load_config(target)
    params = abstract(config)
    rows: Rows = [("module", "layers", "in x out", "parameters")]
    for path, weight in kernels(params).items():
        rows.append((module_path(path)[0], *_shape(weight.shape), f"{math.prod(weight.shape):,}"))
    return "\n".join([_about(target, config, params), "", *_table(rows)])


def of_experiment(experiment: Experiment) -> str:
    """The modules matched, their ranks, trainable parameters and bytes."""
    config = load_config(experiment.model)
    params = abstract(config, experiment.precision)
    settled = plan(params, experiment.rules, hints=promised(params))
    held = _held(experiment, config, params, settled)
    found = nodes(held["adapters"])
    counts = {site.path: count_node(found[site.path]) for site in settled.sites}
    beside = sum(math.prod(leaf.shape) for leaf in held["beside"].values())
    rows: Rows = [("module", "layers", "in x out", "trainable", "method")]
    for site in settled.sites:
        layers = str(math.prod(site.stack)) if site.stack else "1"
        size = f"{site.shape[0]} x {site.shape[1]}"
        rows.append((module_path(site.path)[0], layers, size, f"{counts[site.path]:,}", name(site.method)))
    total, base = sum(counts.values()) + beside, parameters(params)
    lines = [_about(experiment.model, config, params), "", *(_table(rows) if settled.sites else [])]
    if settled.untouched and not experiment.train_base:
        lines += [f"left as they are: {', '.join(sorted({module_path(path)[0] for path in settled.untouched}))}"]
    if beside:
        lines += [f"trained in the base itself: {beside:,} parameters in {len(held['beside'])} arrays"]
    lines += [f"trainable: {total:,} parameters, {total / base:.4%} of the base", "", "bytes on one device:"]
    return "\n".join([*lines, *_table(_memory(held)), "activations and workspace come on top"])


def _held(experiment: Experiment, config: LlamaConfig, params: Any, settled: Plan) -> dict[str, Any]:
    """Every array that a run keeps, as shapes."""
    run = Run(settled, experiment.steps or 1, config.num_key_value_heads)
    watch = None if experiment.procedure is None else experiment.procedure.watch(run)

    def zeros(params: Any, site: Site) -> Hint:
        return Hint(grad=jnp.zeros(kernels(params)[site.path].shape))

    def build(params: Any) -> dict[str, Any]:
        params, adapters = adapt(jax.random.key(experiment.seed_adapter), params, settled, experiment.quant, zeros)
        parts = take_apart(params, adapters, experiment.train_base, experiment.train_also)
        state = start(parts, make_optimizer(experiment.optimizer, experiment.steps or 1, watch))
        return {
            "base": parts.base,
            "beside": parts.trained_base,
            "adapters": parts.adapters,
            "frozen": parts.frozen,
            "optimizer": state.opt,
        }

    return jax.eval_shape(build, params)


def _memory(held: dict[str, Any]) -> Rows:
    trained = _bytes(held["adapters"]) + _bytes(held["beside"])
    sizes = {
        "base": _bytes(held["base"]),
        "trained": trained,
        "indices, scales": _bytes(held["frozen"]),
        "gradients": trained,
        "optimizer": _bytes(held["optimizer"]),
    }
    return [(what, f"{size:,}") for what, size in [*sizes.items(), ("together", sum(sizes.values()))]]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _about(source: str, config: LlamaConfig, params: Any) -> str:
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
