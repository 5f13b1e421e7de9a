"""The step of a run, planned: its arguments as shapes, and its compiled program.

No weights are read, nothing is computed, and the devices of the step need not exist.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sborax.adapters.constraints import ROWS
from sborax.adapters.core import SboraxError
from sborax.adapters.paths import Plan
from sborax.layout.mesh import check_rows, make_mesh
from sborax.layout.sharding import parts_shardings, state_shardings
from sborax.layout.state import Parts, TrainState, start
from sborax.models.backends import choose
from sborax.models.decoder import DecoderConfig, plain_scores
from sborax.models.language_model import LanguageModel, abstract, decoder_of
from sborax.train.experiment import Experiment
from sborax.train.hints import zeros
from sborax.train.prepare import Prepared, prepare

LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
"""Environment variables that libtpu needs on a machine without a TPU. They do not choose the topology."""

UNKNOWN_STEPS = 2**31 - 1
"""Steps assumed for a run given in epochs, since a plan reads no data. No check refuses a run for so many steps."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """The arguments of a run's step as shapes, with their shardings if there is a mesh.

    - prepared: the prepared run, which makes the step.
    - parts, state, batch: the arguments.
    - mesh: None for one device.
    - shardings: of the state; None for one device.
    """

    prepared: Prepared
    parts: Parts
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    mesh: Mesh | AbstractMesh | None = None
    shardings: TrainState | None = None

    @property
    def model(self) -> LanguageModel:
        """The model, without parameters."""
        return self.prepared.model

    @property
    def plan(self) -> Plan:
        """The plan of the adapters."""
        return self.prepared.plan

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the step, in order."""
        return self.state, self.parts.frozen, self.parts.base, self.batch


def outline(
    experiment: Experiment, config: DecoderConfig, length: int | None = None, device: str | None = None
) -> Outline:
    """The step of an experiment on one device.

    - config: of the model.
    - length: tokens of a row; by default the longest that the run's data may have.
    - device: the kind of device that `attention` is chosen for, such as "tpu"; by default attention is XLA's.

    Raises SboraxError as planning does, for attention that the device cannot compute, and for what the procedure
    refuses before the first step.
    """
    params = abstract(config, experiment.precision)
    attention = "xla"
    if device is not None:
        attention = choose(experiment.attention, device, experiment.precision, config.head_dim, plain_scores(config))
    options = {"attention": attention, "expert_capacity": experiment.expert_capacity}
    module = decoder_of(config, experiment.precision, experiment.remat, **options)
    # Without a run directory: procedures write to it only between steps, of which a plan makes none.
    prepared = prepare(experiment, LanguageModel(module, params, config, None), experiment.steps or UNKNOWN_STEPS)

    parts = jax.eval_shape(lambda params: prepared.adapt(params, zeros), params)
    # Made outside of the trace, since the optimiser keeps its constants.
    tx = prepared.tx
    state = jax.eval_shape(lambda parts: start(parts, tx), parts)
    shape = (experiment.accumulate, experiment.batch_size, length or longest_row(experiment, config))
    kinds = {"tokens": np.int32, "targets": np.int32, "counts": np.bool_, "segments": np.int32}
    batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
    return Outline(prepared, parts, state, batch)


def longest_row(experiment: Experiment, config: DecoderConfig) -> int:
    """Tokens of the longest row that a run may have: its largest bucket, else the longest sample allowed."""
    return max(experiment.data.buckets, default=min(experiment.data.max_length, config.context))


def on_mesh(planned: Outline, mesh: Mesh | AbstractMesh) -> Outline:
    """The same step with its arguments sharded over `mesh`, whose devices need not exist.

    Raises SboraxError for rows, heads and leaves that cannot be cut evenly.
    """
    check_rows(planned.batch["tokens"].shape[1], mesh.shape)
    parts = _placed(planned.parts, parts_shardings(mesh, planned.model.config, planned.parts))
    state = dataclasses.replace(planned.state, train=parts.train)
    shardings = state_shardings(mesh, state)
    rows = NamedSharding(mesh, PartitionSpec(None, ROWS))
    batch = _placed(planned.batch, dict.fromkeys(planned.batch, rows))
    return dataclasses.replace(
        planned, parts=parts, state=_placed(state, shardings), batch=batch, mesh=mesh, shardings=shardings
    )


def _placed(tree: Any, shardings: Any) -> Any:
    def placed_leaf(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed_leaf, tree, shardings)


def device_bytes(tree: Any) -> int:
    """The bytes that the leaves of `tree`, shapes or arrays, take on each of their devices."""

    def leaf_bytes(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def argument_bytes(planned: Outline) -> dict[str, int]:
    """The exact bytes of the step's arguments on each device, by kind."""
    return {
        "base": device_bytes(planned.parts.base),
        "trained": device_bytes(planned.state.train),
        "indices, scales": device_bytes(planned.parts.frozen),
        "optimizer": device_bytes((planned.state.opt, planned.state.step)),
        "batch": device_bytes(planned.batch),
    }


def lowered(planned: Outline) -> Any:
    """The step traced for the devices of its mesh, which must not be abstract, or for this process's first device."""
    assert not isinstance(planned.mesh, AbstractMesh)
    step = planned.prepared.make_step(planned.shardings)
    if planned.mesh is None:
        return step.lower(*planned.arguments)
    with jax.set_mesh(planned.mesh):
        return step.lower(*planned.arguments)


def compiled(planned: Outline) -> Any:
    """The compiled step, for the same devices as `lowered`."""
    return lowered(planned).compile()


def pod_mesh(topology: str, sizes: Mapping[str, int] | None) -> Mesh:
    """The mesh over the chips of a TPU slice, which need not exist.

    - topology: such as "v5e:16x16".
    - sizes: of the axes; by default fsdp over all chips.

    Raises SboraxError without the package libtpu, for a topology that libtpu does not know, and for sizes whose product
    is not the number of chips.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise SboraxError(f"topology {topology}: programs for a TPU need libtpu; pip install 'sborax[topology]'")
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    try:
        chips = list(topologies.get_topology_desc(topology, "tpu").devices)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SboraxError(f"topology {topology}: libtpu does not know it ({reason}); such as v5e:16x16") from None
    sizes = sizes or {"fsdp": len(chips)}
    if math.prod(sizes.values()) != len(chips):
        axes = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise SboraxError(f"mesh: {axes} is {math.prod(sizes.values())} devices, {topology} has {len(chips)} chips")
    return make_mesh(sizes, chips)
