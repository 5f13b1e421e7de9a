"""Models whose adapters read values of the previous layer: collection `memory` is handed from layer to layer."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from sborax.adapters.core import Adapter, Context
from sborax.adapters.depth import Memory, continues, remember, stack_of
from sborax.adapters.leaves import nest
from sborax.adapters.paths import kernels
from sborax.adapters.tree import link, nodes


def run(
    module: nn.Module,
    variables: dict[str, Any],
    tokens: Int[Array, "batch seq"],
    *inputs: Any,
    mutable: Sequence[str] = (),
    **options: Any,
) -> Any:
    """`module.apply` with linked adapters. Collection `memory` is added only if an adapter remembers something.

    inputs: segments, positions and context, as for `AbstractDecoder.hidden`.
    """
    adapters = link(variables["adapters"])
    variables = {**variables, "adapters": adapters}
    memory = _empty(variables["params"], adapters, tokens)
    inputs = _masked(inputs, adapters)
    if not memory:
        return module.apply(variables, tokens, *inputs, mutable=list(mutable) or False, **options)
    out, kept = module.apply(  # type: ignore[misc]
        {**variables, "memory": memory}, tokens, *inputs, mutable=[*mutable, "memory"], **options
    )
    return (out, {name: leaves for name, leaves in kept.items() if name != "memory"}) if mutable else out


def _masked(inputs: tuple[Any, ...], adapters: Any) -> tuple[Any, ...]:
    """`inputs` with the segments as the context's mask, if an adapter takes means over tokens."""
    segments, positions = (*inputs, None, None)[:2]
    ctx = inputs[2] if len(inputs) > 2 else Context()
    pools = any(node.method.pools for node in nodes(adapters).values())
    if segments is None or ctx.mask is not None or not pools:
        return inputs
    return segments, positions, dataclasses.replace(ctx, mask=segments)


def _empty(params: Any, adapters: Any, tokens: Int[Array, "batch seq"]) -> dict[str, Any]:
    """The memory that the first layer of every chain finds: zeros."""
    weights, memory = kernels(params), {}
    for path, node in nodes(adapters).items():
        if not node.method.linked or path not in weights:
            continue
        of_layer = functools.partial(_of_layer, stacked=bool(stack_of(node)))
        x = jax.ShapeDtypeStruct((*tokens.shape, weights[path].shape[-2]), params["embed_tokens"]["embedding"].dtype)
        shapes = jax.eval_shape(of_layer, x, node)
        if shapes:
            memory[path] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return nest(memory)


def _of_layer(x: Array, node: Adapter, stacked: bool) -> Memory:
    return remember(x, jax.tree.map(lambda leaf: leaf[0], node) if stacked else node, Context())


def handed_on(before: Memory, after: Memory, adapters: Any, following: Any) -> Memory:
    """The memory that a layer finds: that of the previous layer where its chain goes on, else `after`.

    - before: memory of the previous layer, whose adapters are `adapters`.
    - after: memory of the layer, whose adapters are `following`, as it is without a previous one.
    """
    earlier, later = nodes(adapters), nodes(following)
    handed, initial = values_at(before, earlier), values_at(after, later)
    goes_on = [path for path in initial if path in handed and continues(earlier[path], later[path])]
    return nest({**initial, **{path: handed[path] for path in goes_on}})


def values_at(collection: Memory, paths: Iterable[str]) -> dict[str, Any]:
    """The entries of a collection at these paths, without those that are empty."""
    entries = {
        path: functools.reduce(lambda tree, name: tree.get(name, {}), path.split("/"), collection) for path in paths
    }
    return {path: entry for path, entry in entries.items() if entry}
