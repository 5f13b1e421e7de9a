"""Running a model whose adapters read what the layer before saw: collection `memory` goes from layer to layer."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from sborax.adapters.core import Adapter, Context
from sborax.adapters.depth import Memory, continues, remember, stack_of
from sborax.adapters.paths import kernels
from sborax.adapters.tree import link, nest, nodes


def run(
    module: nn.Module,
    variables: dict[str, Any],
    tokens: Int[Array, "batch seq"],
    *inputs: Any,
    mutable: Sequence[str] = (),
    **options: Any,
) -> Any:
    """`module.apply` with linked adapters. Nothing else is added for those that remember nothing."""
    adapters = link(variables["adapters"])
    variables = {**variables, "adapters": adapters}
    memory = _empty(variables["params"], adapters, tokens)
    if not memory:
        return module.apply(variables, tokens, *inputs, mutable=list(mutable) or False, **options)
    out, kept = module.apply(  # type: ignore[misc]
        {**variables, "memory": memory}, tokens, *inputs, mutable=[*mutable, "memory"], **options
    )
    return (out, {name: leaves for name, leaves in kept.items() if name != "memory"}) if mutable else out


def _empty(params: Any, adapters: Any, tokens: Int[Array, "batch seq"]) -> dict[str, Any]:
    """What the first layer of every chain finds: zeros."""
    found, memory = kernels(params), {}
    for path, node in nodes(adapters).items():
        if not node.method.linked or path not in found:
            continue
        one = functools.partial(_of_layer, stacked=bool(stack_of(node)))
        x = jax.ShapeDtypeStruct((*tokens.shape, found[path].shape[-2]), params["embed_tokens"]["embedding"].dtype)
        shapes = jax.eval_shape(one, x, node)
        if shapes:
            memory[path] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return nest(memory)


def _of_layer(x: Array, node: Adapter, stacked: bool) -> Memory:
    return remember(x, jax.tree.map(lambda leaf: leaf[0], node) if stacked else node, Context())


def handed_on(before: Memory, after: Memory, adapters: Any, following: Any) -> Memory:
    """`after`, the memory of one layer before it runs, with that of the layer `before` wherever a chain goes on."""
    ours, theirs = nodes(adapters), nodes(following)
    kept, found = values_at(before, ours), values_at(after, theirs)
    goes_on = [path for path in found if path in kept and continues(ours[path], theirs[path])]
    return nest({**found, **{path: kept[path] for path in goes_on}})


def values_at(collection: Memory, paths: Iterable[str]) -> dict[str, Any]:
    """What a collection holds at those of the paths where it holds something."""
    found = {
        path: functools.reduce(lambda tree, name: tree.get(name, {}), path.split("/"), collection) for path in paths
    }
    return {path: own for path, own in found.items() if own}
