"""Which axis of a mesh each axis of a parameter and of an activation lies on.

A mesh has the axes data, fsdp, expert and tensor. Rows of a batch lie on data, fsdp and expert. Kernels are cut along
fsdp, and along tensor on the side of their heads or channels: the output of q, k, v, gate and up, the input of o and
down. Along expert, the experts of a mixture are cut, and other parameters as along fsdp, so none is replicated.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from sborax.adapters.constraints import AXES, EXPERT, ROWS, SHARED, compiled_axes, cut, dividing, mesh_axes
from sborax.adapters.core import AbstractWeight, Adapter, SboraxError, Weight, is_weight
from sborax.adapters.leaves import map_with_path
from sborax.adapters.tree import specs, stack_of
from sborax.models.decoder import DecoderConfig, count_experts

ROW_PARALLEL = ("o_proj", "down_proj")


def _mesh_axes(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """The mesh axes of a parameter's axes without its stack axes; those of an expert with the axis of experts."""
    module, leaf = path.split("/")[-2:]
    if leaf == "embedding":
        # Whole vectors, since a look-up of cut vectors would have to gather them.
        all_axes, fully = _fully(sizes, "tensor"), _fully(sizes)
        return (_dividing(shape[0], sizes, all_axes, fully, ("tensor", "fsdp"), ("fsdp",), ("tensor",)), None)
    if leaf == "kernel":
        if is_expert(path):
            return (EXPERT, *_split(module, "fsdp"))
        side = -1 if module in ROW_PARALLEL else -2
        all_axes = _fully(sizes)
        fully = all_axes if len(all_axes) > 1 and _dividing(shape[side], sizes, all_axes) else "fsdp"
        if module == "lm_head":
            return (fully, _dividing(shape[1], sizes, ("tensor",)))
        return _split(module, fully)
    if leaf == "bias":
        return (None,) if module in ROW_PARALLEL else ("tensor",)
    return (None,)


def is_expert(path: str) -> bool:
    """Whether a kernel is that of the experts of a mixture, which has an axis of experts before input and output."""
    return path.split("/")[-3:-2] == ["experts"]


def _split(module: str, fully: Any) -> tuple[Any, Any]:
    """The mesh axes of a projection's input and output: tensor for heads or channels, `fully` on the other side."""
    return ("tensor", fully) if module in ROW_PARALLEL else (fully, "tensor")


def _fully(sizes: Mapping[str, int], *prefix: str) -> tuple[str, ...]:
    """The mesh axes that dense parameters are cut over to save memory, after `prefix`."""
    return (*prefix, "fsdp", EXPERT) if sizes.get(EXPERT, 1) > 1 else (*prefix, "fsdp")


def _dividing(side: int, sizes: Mapping[str, int], *choices: tuple[str, ...]) -> tuple[str, ...] | None:
    """The first choice that divides a side, such as a vocabulary that one added token made odd; None without one."""
    return next((names for names in choices if side % math.prod(sizes[name] for name in names) == 0), None)


def base_specs(params: Any, sizes: Mapping[str, int]) -> Any:
    """The spec of every parameter on a mesh of these sizes, in a tree of the same paths.

    A quantised weight has the spec of its kernel. If its blocks cannot be cut evenly along the input, the output is cut
    instead. A vocabulary is cut over as many axes as divide it.
    """

    def leaf_spec(path: str, leaf: Any) -> PartitionSpec:
        axes = _mesh_axes(path, leaf.shape, sizes)
        if is_weight(leaf):
            axes = (*axes[:-2], *_of_blocks(leaf, axes[-2:], sizes))
        return PartitionSpec(*(None,) * (len(leaf.shape) - len(axes)), *axes)

    return map_with_path(leaf_spec, params)


def _of_blocks(weight: AbstractWeight, axes: tuple[Any, Any], sizes: Mapping[str, int]) -> tuple[Any, Any]:
    """The mesh axes of a quantised weight's input and output: all on the output if they would cut blocks apart."""
    inner, outer = map(mesh_axes, axes)
    parts = math.prod(sizes[name] for name in inner)
    if not any(part.shape[-2] % parts for part in _matrices(weight)):
        return axes
    return None, tuple(sorted(inner + outer, key=AXES.index))


def _matrices(weight: AbstractWeight) -> list[Any]:
    """The leaves of a quantised weight with as many axes as it has."""
    return [leaf for leaf in jax.tree.leaves(weight) if len(leaf.shape) == len(weight.shape)]


def quantised_specs(weight: AbstractWeight, spec: PartitionSpec) -> Any:
    """Specs of a quantised kernel's leaves: matrices are cut as the kernel is, shared scales along stack axes alone."""
    axes, stack = len(weight.shape), tuple(spec)[: len(weight.shape) - 2]
    shared = PartitionSpec(*stack) if any(stack) else PartitionSpec()
    return jax.tree.map(lambda leaf: spec if len(leaf.shape) == axes else shared, weight)


def expert_specs(module: str, kernel: Weight, cut: str | None) -> Any:
    """Specs of the kernels (experts, in, out) of a layer's experts on the current mesh, as `base_specs` has them.

    - cut: the mesh axis that experts are cut over; None if all devices have all experts.
    """
    axes = compiled_axes()
    inner, outer = _split(module, "fsdp")
    if isinstance(kernel, AbstractWeight):
        inner, outer = _of_blocks(kernel, (inner, outer), {name: axes.get(name, 1) for name in AXES})

    def leaf_spec(leaf: Array) -> PartitionSpec:
        if leaf.ndim < len(kernel.shape):
            return PartitionSpec(cut)
        several = (tuple(name for name in mesh_axes(entry) if axes.get(name, 1) > 1) for entry in (inner, outer))
        return PartitionSpec(cut, *map(dividing, leaf.shape[1:], several))

    return jax.tree.map(leaf_spec, kernel)


def check_model(config: DecoderConfig, sizes: Mapping[str, int]) -> None:
    """Raise SboraxError if a mesh of these sizes cannot divide the heads or the experts of a model."""
    tensor, devices, experts = sizes[SHARED], sizes[EXPERT], count_experts(config)
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name)
        if heads % tensor:
            raise SboraxError(f"mesh: {name} = {heads} is not divisible by tensor = {tensor}")
    if devices > 1 and not experts:
        raise SboraxError(f"mesh: expert = {devices}, but {config.model_type} has no experts; use fsdp or data")
    if experts % devices:
        raise SboraxError(f"mesh: num_experts = {experts} is not divisible by expert = {devices}")


def over_rows(x: Array) -> Array:
    """`x` with its first axis cut over the mesh axes of rows and the others whole, if there is such a mesh."""
    return cut(x, ROWS, *(None,) * (x.ndim - 1))


def used_whole(adapter: Adapter, module: str) -> Adapter:
    """`adapter` as the projection `module` uses it on a mesh: gathered along fsdp, as its kernel is.

    Otherwise the compiler may cut activations like the leaves, and send activations. Leaves stay cut along tensor.
    """
    if not compiled_axes():
        return adapter
    stack = (None,) * len(stack_of(adapter))
    leaf_specs = specs({"kernel": adapter}, {"kernel": PartitionSpec(*stack, *_used_axes(module))})["kernel"]
    return jax.tree.map(lambda leaf, leaf_spec: cut(leaf, *leaf_spec), adapter, leaf_specs)


def sent_packed(kernel: Weight, module: str) -> Weight:
    """`kernel` as the projection `module` uses it on a mesh: a quantised one is gathered before it is made dense."""
    if isinstance(kernel, AbstractWeight) and compiled_axes():
        return kernel.cut_along(*_used_axes(module))
    return kernel


def _used_axes(module: str) -> tuple[str | None, str | None]:
    if module == "embed_tokens":
        return None, None
    return ("tensor", None) if module in ROW_PARALLEL else (None, "tensor")
