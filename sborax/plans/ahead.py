"""A run's step before there is a run: its arguments as shapes, and the program that it would be.

Nothing is read or computed, and no device that the step is for need be there.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sborax.adapters.constraints import ROWS
from sborax.adapters.core import Hint, SboraxError
from sborax.adapters.paths import Plan, Site, kernels
from sborax.layout.mesh import check_rows, make_mesh
from sborax.layout.sharding import parts_shardings, state_shardings
from sborax.layout.state import Parts, TrainState, start
from sborax.models.backends import choose
from sborax.models.decoder import DecoderConfig
from sborax.models.language_model import LanguageModel, abstract, decoder_of
from sborax.train.experiment import Experiment
from sborax.train.prepare import Prepared, prepare

LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
"""What libtpu asks of its surroundings where there is no TPU; the topology is named apart from that."""

UNKNOWN_STEPS = 2**31 - 1
"""Steps of a run that is given in epochs: a plan reads no data, and more steps than any run has refuse nothing."""


@dataclasses.dataclass(frozen=True)
class Outline:
    """The arguments of a run's step as shapes, on a mesh with where they lie. prepared: what the step is made of."""

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
        """What is adapted."""
        return self.prepared.plan

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the step is called with."""
        return self.state, self.parts.frozen, self.parts.base, self.batch


def outline(
    experiment: Experiment, config: DecoderConfig, length: int | None = None, device: str | None = None
) -> Outline:
    """The step of `experiment` on a model of this config, on one device.

    - length: tokens of a row; by default the longest that the run's data may have.
    - device: what `attention` is chosen for, such as "tpu"; by default it is XLA's.

    Raises SboraxError as planning does, for attention that the device cannot compute, and for what the procedure
    refuses before the first step.
    """
    params = abstract(config, experiment.precision)
    chosen = "xla"
    if device is not None:
        chosen = choose(experiment.attention, device, experiment.precision, config.head_dim)
    module = decoder_of(config, experiment.precision, experiment.remat, attention=chosen)
    # What a procedure keeps in a run directory is kept between steps alone.
    prepared = prepare(experiment, LanguageModel(module, params, config, None), experiment.steps or UNKNOWN_STEPS)

    def zeros(params: Any, site: Site) -> Hint:
        return Hint(grad=jnp.zeros(kernels(params)[site.path].shape))

    parts = jax.eval_shape(lambda params: prepared.adapt(params, zeros), params)
    # Made outside of a trace, since its constants are kept.
    tx = prepared.tx
    state = jax.eval_shape(lambda parts: start(parts, tx), parts)
    shape = (experiment.accumulate, experiment.batch_size, length or longest_row(experiment, config))
    kinds = {"tokens": np.int32, "targets": np.int32, "counts": np.bool_, "segments": np.int32}
    batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in kinds.items()}
    return Outline(prepared, parts, state, batch)


def longest_row(experiment: Experiment, config: DecoderConfig) -> int:
    """Tokens of the longest row that a run may see: its largest bucket, else the longest sample."""
    return max(experiment.data.buckets, default=min(experiment.data.max_length, config.context))


def on_mesh(one: Outline, mesh: Mesh | AbstractMesh) -> Outline:
    """The same step with its arguments on the devices of `mesh`, which need not exist.

    Raises SboraxError for rows, heads and leaves that cannot be cut evenly.
    """
    check_rows(one.batch["tokens"].shape[1], mesh.shape)
    parts = _placed(one.parts, parts_shardings(mesh, one.model.config, one.parts))
    state = dataclasses.replace(one.state, train=parts.train)
    shardings = state_shardings(mesh, state)
    rows = NamedSharding(mesh, PartitionSpec(None, ROWS))
    batch = _placed(one.batch, dict.fromkeys(one.batch, rows))
    return dataclasses.replace(
        one, parts=parts, state=_placed(state, shardings), batch=batch, mesh=mesh, shardings=shardings
    )


def _placed(tree: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), tree, where)


def device_bytes(tree: Any) -> int:
    """Bytes that the leaves of `tree`, shapes or arrays, take on each of their devices."""

    def one(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def argument_bytes(one: Outline) -> dict[str, int]:
    """Exact bytes of the step's arguments on each device, by what they are."""
    return {
        "base": device_bytes(one.parts.base),
        "trained": device_bytes(one.state.train),
        "indices, scales": device_bytes(one.parts.frozen),
        "optimizer": device_bytes((one.state.opt, one.state.step)),
        "batch": device_bytes(one.batch),
    }


def compiled(one: Outline) -> Any:
    """The step as a program for the devices of its mesh, which is a `Mesh` then, or for the first of this process."""
    assert not isinstance(one.mesh, AbstractMesh)
    step = one.prepared.make_step(one.shardings)
    if one.mesh is None:
        return step.lower(*one.arguments).compile()
    with jax.set_mesh(one.mesh):
        return step.lower(*one.arguments).compile()


def pod_mesh(topology: str, sizes: Mapping[str, int] | None) -> Mesh:
    """The mesh over the chips of a TPU slice that need not be there, such as "v5e:16x16"; by default fsdp over all.

    Raises SboraxError without the package libtpu, for a topology that it does not know, and for sizes whose product
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
        told = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise SboraxError(f"mesh: {told} is {math.prod(sizes.values())} devices, {topology} has {len(chips)} chips")
    return make_mesh(sizes, chips)
