"""Calls of models whose adapters read more than their input.

Such adapters may read values of the previous layer, in the collection `memory`; the places from which they act, which
are found in the whole text before the call; and the mask of padding, which is left out of means.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Int

from sborax.adapters.bank import separate
from sborax.adapters.core import Adapter, Context, SboraxError
from sborax.adapters.depth import Memory, continues, link, remember, stack_of
from sborax.adapters.invocation import find, invocations_of
from sborax.adapters.leaves import nest
from sborax.adapters.paths import kernels
from sborax.adapters.tree import averages_tokens, nodes


def run(
    module: nn.Module,
    variables: dict[str, Any],
    tokens: Int[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    ctx: Context = Context(),
    *,
    mutable: Sequence[str] = (),
    **options: Any,
) -> Any:
    """`module.apply` with linked adapters, and with what some of them need to know of the whole text.

    These are the places from which they act, and where there is padding. Collection `memory` is added only if an
    adapter remembers something.

    - ctx: what it says of invocations is not looked for in `tokens`.

    Raises SboraxError for a call over a `past` whose context does not say what was invoked there.
    """
    variables = linked(variables)
    adapters = variables["adapters"]
    missing = [invocation for invocation in invocations_of(nodes(adapters)) if invocation not in ctx.invocations]
    if missing:
        if "past" in options:
            raise SboraxError(
                f"an adapter acts from the tokens {missing[0]} on, and a call over a cache does not see the text "
                "before: give ctx=Context(invocations=...), see sborax.adapters.invocation.continuation"
            )
        ctx = dataclasses.replace(ctx, invocations={**ctx.invocations, **find(tokens, segment_ids, missing)})
    if ctx.mask is None and averages_tokens(adapters):
        ctx = dataclasses.replace(ctx, mask=segment_ids)
    inputs = (segment_ids, positions, ctx)
    memory = _empty(variables["params"], adapters, tokens)
    if not memory:
        return module.apply(variables, tokens, *inputs, mutable=list(mutable) or False, **options)
    out, collected = module.apply(  # type: ignore[misc]
        {**variables, "memory": memory}, tokens, *inputs, mutable=[*mutable, "memory"], **options
    )
    return (out, {name: leaves for name, leaves in collected.items() if name != "memory"}) if mutable else out


def linked(variables: dict[str, Any]) -> dict[str, Any]:
    """The collections of a model with adapters that need no weights of other layers.

    What all layers of a stack share goes into collection `bank`, from which `adapter_of` reads it: the scan over layers
    does not cut it, so there is one copy. Linking twice changes nothing.
    """
    if "bank" in variables:
        return variables
    adapters, shared = separate(nodes(variables["adapters"]))
    return {**variables, "adapters": nest(link(adapters)), "bank": nest(shared)}


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
