"""Which axis of a mesh each axis of a parameter and of an activation lies on.

A mesh has the axes data, fsdp and tensor. Rows of a batch lie on data and fsdp. Kernels are cut along fsdp, and along
tensor on the side of their heads or channels: the output of q, k, v, gate and up, the input of o and down.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from sborax.adapters.constraints import ROWS, compiled_axes, cut
from sborax.adapters.core import AbstractWeight, Adapter, SboraxError, Weight, is_weight
from sborax.adapters.leaves import map_with_path
from sborax.adapters.tree import specs, stack_of
from sborax.models.decoder import DecoderConfig

ROW_PARALLEL = ("o_proj", "down_proj")


def _mesh_axes(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """The mesh axes of a parameter's axes without its stack axes."""
    module, leaf = path.split("/")[-2:]
    if leaf == "embedding":
        # Whole vectors, since a look-up of cut vectors would have to gather them.
        return (_dividing(shape[0], sizes, ("tensor", "fsdp"), ("fsdp",), ("tensor",)), None)
    if module == "lm_head" and leaf == "kernel":
        return ("fsdp", _dividing(shape[1], sizes, ("tensor",)))
    if leaf == "kernel":
        return ("tensor", "fsdp") if module in ROW_PARALLEL else ("fsdp", "tensor")
    if leaf == "bias":
        return (None,) if module in ROW_PARALLEL else ("tensor",)
    return (None,)


def _dividing(vocab: int, sizes: Mapping[str, int], *choices: tuple[str, ...]) -> tuple[str, ...] | None:
    """The first choice that divides the vocabulary, which one added token can make odd; None if there is none."""
    return next((names for names in choices if vocab % math.prod(sizes[name] for name in names) == 0), None)


def base_specs(params: Any, sizes: Mapping[str, int]) -> Any:
    """The spec of every parameter on a mesh of these sizes, in a tree of the same paths.

    A quantised weight has the spec of its kernel. If its blocks cannot be cut evenly along the input, the output is cut
    instead. A vocabulary is cut over as many axes as divide it.
    """

    def leaf_spec(path: str, leaf: Any) -> PartitionSpec:
        axes = _mesh_axes(path, leaf.shape, sizes)
        if is_weight(leaf) and any(part.shape[-2] % sizes[axes[0]] for part in _matrices(leaf)):
            axes = (None, axes)
        return PartitionSpec(*(None,) * (len(leaf.shape) - len(axes)), *axes)

    return map_with_path(leaf_spec, params)


def _matrices(weight: AbstractWeight) -> list[Any]:
    """The leaves of a quantised weight with as many axes as it has."""
    return [leaf for leaf in jax.tree.leaves(weight) if len(leaf.shape) == len(weight.shape)]


def quantised_specs(weight: AbstractWeight, spec: PartitionSpec) -> Any:
    """Specs of a quantised kernel's leaves: matrices are cut as the kernel is, shared scales are on every device."""
    axes = len(weight.shape)
    return jax.tree.map(lambda leaf: spec if len(leaf.shape) == axes else PartitionSpec(), weight)


def check_heads(config: DecoderConfig, tensor: int) -> None:
    """Raise SboraxError if heads cannot be divided among `tensor` devices."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name)
        if heads % tensor:
            raise SboraxError(f"mesh: {name} = {heads} is not divisible by tensor = {tensor}")


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
    return ("tensor", None) if module in ROW_PARALLEL else (None, "tensor")
