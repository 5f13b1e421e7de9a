"""A run over several devices: its mesh, and the shardings of everything that a step reads and writes."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from sborax.adapters.constraints import ROWS, SHARED, mesh_axes
from sborax.adapters.core import AbstractKernelless, Adapter, Leaves, SboraxError, is_adapter, is_weight
from sborax.adapters.depth import stack_of
from sborax.adapters.leaves import flatten, map_with_path, nest
from sborax.adapters.tables import leaf_of
from sborax.adapters.tree import Adapters, Params, combine, specs
from sborax.layout.mesh import check_rows, make_mesh
from sborax.layout.spread import SMALL, spread
from sborax.layout.state import Flat, Parts, TrainState, take_apart
from sborax.models.decoder import DecoderConfig
from sborax.models.sharding import base_specs, check_model, quantised_specs


def check_divisible(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> None:
    """Raise SboraxError, which names the axis, for a leaf that cannot be cut evenly."""
    for axis, names in enumerate(spec):
        size = math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
        if shape[axis] % size:
            raise SboraxError(f"{path}: axis {axis} of {shape} is not divisible by mesh axis {names!r} of size {size}")


def _shardings(mesh: Mesh | AbstractMesh, tree: PyTree, tree_specs: PyTree) -> PyTree:
    """`NamedSharding` for every leaf of `tree`, from a tree of specs of the same structure."""

    def leaf_sharding(path: str, leaf: Any, spec: PartitionSpec) -> NamedSharding:
        check_divisible(path, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    return map_with_path(leaf_sharding, tree, tree_specs, is_leaf=None)


def _flat_specs(leaves: Flat, kernels: Flat) -> Flat:
    """Specs of leaves by path. A quantised weight has a tree of them, from the spec of its kernel in `kernels`."""
    return {
        path: quantised_specs(leaf, kernels[path]) if is_weight(leaf) else kernels[path]
        for path, leaf in leaves.items()
    }


def parts_shardings(mesh: Mesh | AbstractMesh, config: DecoderConfig, parts: Parts) -> Parts:
    """Shardings of the parts of a model. Adapter leaves are cut along the mesh axes of the kernel that they adapt.

    Raises SboraxError for heads and parameters that cannot be cut evenly.
    """
    check_model(config, mesh.shape)
    base = base_specs(nest({**parts.base, **parts.trained_base}), mesh.shape)
    flat = flatten(base)
    return Parts(
        _adapter_shardings(mesh, parts.adapters, base),
        _adapter_shardings(mesh, parts.frozen, base),
        _shardings(mesh, parts.base, _flat_specs(parts.base, flat)),
        _shardings(mesh, parts.trained_base, _flat_specs(parts.trained_base, flat)),
    )


def _adapter_shardings(mesh: Mesh | AbstractMesh, adapters: Adapters, base: PyTree) -> Adapters:
    """Shardings of one half of the adapters, from the specs of the parameters."""
    kernels = flatten(base)

    def node_shardings(path: str, node: Adapter, natural: Adapter) -> Adapter:
        stack = len(stack_of(node))
        # Without a kernel an adapter is on every device.
        without = isinstance(node.method, AbstractKernelless)
        entries = () if without else tuple(kernels[leaf_of(path, kernels)])[stack:]
        names = [name for entry in entries for name in mesh_axes(entry)]

        def half(kind: str, leaves: Leaves, leaf_specs: Leaves, small: int) -> Leaves:
            def leaf_sharding(inner: str, leaf: Any, spec: PartitionSpec) -> NamedSharding:
                # Devices that share a projection hold what belongs to their own features.
                shared = [SHARED if SHARED in mesh_axes(entry) else None for entry in spec]
                check_divisible(f"{path}/{kind}/{inner}", leaf.shape, PartitionSpec(*shared), mesh)
                leaf_names = [name for entry in tuple(spec)[stack:] for name in mesh_axes(entry)]
                return spread(mesh, leaf.shape, spec, stack, leaf_names if leaf.size < small else names)

            return map_with_path(leaf_sharding, leaves, leaf_specs)

        train, frozen = half("train", node.train, natural.train, 0), half("frozen", node.frozen, natural.frozen, SMALL)
        return Adapter(train, frozen, node.method, node.in_axes)

    return map_with_path(node_shardings, adapters, specs(adapters, base), is_leaf=is_adapter)


def state_shardings(mesh: Mesh | AbstractMesh, state: TrainState) -> TrainState:
    """Shardings of the state of a run. Statistics of the optimiser are sharded like the leaf they belong to.

    The path of a statistic ends in the path of its leaf. Statistics of another shape are small and on every device.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    trained = dict(jax.tree_util.tree_leaves_with_path(state.train))

    def beside(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        named = (trained.get(keys[begin:]) for begin in range(len(keys)))
        return next((owner.sharding for owner in named if owner is not None and owner.shape == leaf.shape), replicated)

    train = jax.tree.map(lambda leaf: leaf.sharding, state.train)
    return TrainState(replicated, train, jax.tree_util.tree_map_with_path(beside, state.opt))


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """The leaves on their shardings. Leaves that every process has a copy of are sharded without communication."""

    def put_leaf(leaf: Any, sharding: Any) -> Any:
        if sharding.is_fully_addressable or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)
        copy = np.asarray(leaf)
        return jax.make_array_from_callback(copy.shape, sharding, lambda index: copy[index])

    return jax.tree.map(put_leaf, tree, shardings)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of a run on a mesh. Without a mesh everything is on one device."""

    mesh: Mesh | None = None

    @classmethod
    def of(cls, sizes: Mapping[str, int] | None, batch_size: int) -> "Layout":
        """The layout on a mesh of these sizes; None for no mesh.

        Raises SboraxError as `make_mesh` does, and for a batch whose rows cannot be divided evenly.
        """
        if sizes is None:
            if jax.process_count() > 1:
                raise SboraxError(
                    f"mesh: {jax.process_count()} processes have {jax.device_count()} devices together; say how the "
                    f'run lies on them, such as mesh={{"fsdp": {jax.device_count()}}}'
                )
            return cls()
        mesh = make_mesh(sizes)
        check_rows(batch_size, mesh.shape)
        return cls(mesh)

    def __str__(self) -> str:
        sizes = {} if self.mesh is None else self.mesh.shape
        return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"

    @property
    def devices(self) -> int:
        """The number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which steps are traced and run."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def of_params(self, config: DecoderConfig, shapes: Params) -> Params:
        """Shardings of parameters of these shapes, for reading them.

        Raises SboraxError for heads and leaves that cannot be cut evenly.
        """
        assert self.mesh is not None
        check_model(config, self.mesh.shape)
        kernels = flatten(base_specs(shapes, self.mesh.shape))
        return _shardings(self.mesh, shapes, nest(_flat_specs(flatten(shapes), kernels)))

    def place(self, parts: Parts, config: DecoderConfig) -> Parts:
        """The parts on their devices."""
        if self.mesh is None:
            return parts
        return put(parts, parts_shardings(self.mesh, config, parts))

    def model(self, params: Params, adapters: Adapters | None, config: DecoderConfig) -> tuple[Params, Adapters | None]:
        """A model and its adapters on their devices.

        Raises SboraxError as `parts_shardings` does.
        """
        if self.mesh is None:
            return params, adapters
        parts = self.place(take_apart(params, adapters or {}), config)
        return nest(parts.base), combine(parts.adapters, parts.frozen) if adapters else None

    def state(self, state: TrainState) -> tuple[TrainState, TrainState | None]:
        """The state on its devices, and its shardings if there is a mesh."""
        if self.mesh is None:
            return state, None
        shardings = state_shardings(self.mesh, state)
        return put(state, shardings), shardings

    def beside(self, tree: PyTree, other: PyTree) -> PyTree:
        """The leaves of `tree` on the devices of the leaves of `other`, which has the same structure."""
        if self.mesh is None:
            return tree
        return put(tree, jax.tree.map(lambda leaf: leaf.sharding, other))

    def rows(self, batch_size: int) -> frozenset[int] | None:
        """The rows of a batch that lie on devices of this process; None for all."""
        if self.mesh is None:
            return None
        shards = NamedSharding(self.mesh, PartitionSpec(ROWS)).addressable_devices_indices_map((batch_size,))
        return frozenset(row for index in shards.values() if index for row in range(*index[0].indices(batch_size)))

    def batch(self, batch: Any, axis: int = 1) -> Any:
        """A batch (accumulate, batch, length) on its devices; `axis` is that of its rows."""
        if self.mesh is None:
            return batch
        sharding = NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, ROWS))
        return put(batch, jax.tree.map(lambda _: sharding, batch))
