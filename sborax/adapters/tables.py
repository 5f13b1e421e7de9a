"""Adapters of the embedding, a table of vectors that is looked up, and of a head that is tied to it.

A change by thin factors, W' = W + a b, needs no (vocab, d) array: of token t it is (a[t]) b. A head that is the same
table adds (h b^T) a^T to its logits. `plan` chooses the path of an adapter by what reads it:

    embed_tokens/embedding   look-ups and, where the head is tied, the head: they share one adapter
    embed_tokens/lookup      look-ups alone, of a model with a tied head
    lm_head/kernel           the head, tied or not

So in a model with a tied head `[("embed_tokens", LoRA())]` keeps the two tied, `[("embed_tokens|lm_head", LoRA())]`
gives each its adapter, and `[("lm_head", None), ("embed_tokens", LoRA())]` leaves the head as it is.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from sborax.adapters.compose import Scaled, Sum, part_context
from sborax.adapters.core import (
    OUTPUT_DROPOUTS,
    AbstractFactored,
    AbstractMethod,
    Adapter,
    Context,
    Use,
    cast,
    dropout,
)
from sborax.adapters.leaves import flatten

TABLE, LOOKUP, HEAD = "embed_tokens/embedding", "embed_tokens/lookup", "lm_head/kernel"


def tables(params: Any) -> dict[str, Any]:
    """The (in, out) weights that are no kernels of their own, by the path of their adapter.

    In a model whose head is tied, look-ups and the head are further such weights, since each may have its adapter. Of
    the head there is only the shape: `weight_at` transposes the table.
    """
    leaves = flatten(params)
    if TABLE not in leaves:
        return {}
    table = leaves[TABLE]
    if HEAD in leaves:
        return {TABLE: table}
    return {TABLE: table, LOOKUP: table, HEAD: jax.ShapeDtypeStruct(table.shape[::-1], table.dtype)}


def weight_at(path: str, leaves: Mapping[str, Any]) -> Any:
    """The weight of the adapter at `path`, (in, out); None if there is none, as for routers and banks.

    - leaves: of the model, by path; arrays or shapes.
    """
    leaf = leaf_of(path, leaves)
    if leaf == path or path == LOOKUP:
        return leaves.get(leaf)
    table = leaves[leaf]
    return jax.ShapeDtypeStruct(table.shape[::-1], table.dtype) if isinstance(table, jax.ShapeDtypeStruct) else table.T


def use_of(path: str, weights: Mapping[str, Any]) -> Use:
    """What the weight of an adapter is. weights: those that may have an adapter, by its path."""
    if path == LOOKUP:
        return "lookup"
    return ("tied" if LOOKUP in weights else "lookup") if path == TABLE else "kernel"


def leaf_of(path: str, leaves: Mapping[str, Any]) -> str:
    """The path of the leaf that an adapter changes: the table, where look-ups or a tied head have an adapter.

    - leaves: of the model, by path.
    """
    return TABLE if path == LOOKUP or (path == HEAD and HEAD not in leaves and TABLE in leaves) else path


def why_no_table(method: AbstractMethod, use: Use) -> str:
    """Empty, or why a method cannot adapt a table.

    - use: what the table is for: look-ups, also those of a tied head, or a head of its own, which is a projection.
    """
    if isinstance(method, Sum | Scaled):
        return next((why for part in method.members if (why := why_no_table(part, use))), "")
    if method.rewrites_base:
        return "it takes its start out of the table; use a method that leaves the base as it is, such as LoRA"
    if method.no_merge or method.draws or method.linked:
        return f"{method.no_merge or method.draws or 'it links layers'}; use a plain product of factors, such as LoRA"
    if "inputs" in method.needs:
        return (
            "it starts from the inputs of a projection, and a table has none; use a start without data, such as LoRA's"
        )
    if method.approximates:
        return "its backward pass is that of projections alone; use a method with exact gradients, such as LoRA"
    rate = next((name for name in sorted(OUTPUT_DROPOUTS) if getattr(method, name, 0.0)), None)
    if rate is not None and use != "kernel":
        return f"its {rate} drops outputs of a projection, and look-ups have none; leave it 0"
    if not isinstance(method, AbstractFactored):
        return "its change is no product of thin factors; use a method whose change is, such as LoRA"
    return ""


def look_up(tokens: Int[Array, "*batch"], table: Float[Array, "vocab d"], node: Adapter) -> Float[Array, "*batch d"]:
    """The change of the vectors of `tokens`: s (a[t]) b, in the dtype of `table`. Nothing is dropped, as in PEFT."""
    change = 0
    for a, b, _, _ in _factors(node, table.shape, Context()):
        change = change + cast(a.at[tokens].get(mode="clip"), table) @ cast(b, table)
    return change  # type: ignore[return-value]


def tied_head(
    hidden: Float[Array, "*batch d"], table: Float[Array, "vocab d"], node: Adapter, ctx: Context
) -> Float[Array, "*batch vocab"]:
    """What the adapter of a table adds to the logits of a head that is tied to it: s (dropout(h) b^T) a^T."""
    flat, change = hidden.reshape(-1, hidden.shape[-1]), 0
    for a, b, part, of_part in _factors(node, table.shape, ctx):
        change = change + (dropout(flat, part, of_part) @ cast(b, flat).T) @ cast(a, flat).T
    return change.reshape(*hidden.shape[:-1], -1)  # type: ignore[union-attr]


def _factors(
    node: Adapter, shape: tuple[int, ...], ctx: Context
) -> Iterator[tuple[Float[Array, "vocab r"], Float[Array, "r d"], Adapter, Context]]:
    """Thin factors whose products sum to the change, scale included, each with its adapter and its context."""
    method = node.method
    if isinstance(method, AbstractFactored):
        yield (*method.factors(node, (shape[0], shape[1])), node, ctx)
    elif isinstance(method, Sum | Scaled):
        for i, (child, _) in enumerate(method.children(node)):
            for a, b, part, of_part in _factors(child, shape, part_context(method, ctx, i)):
                yield node.frozen["factor"] * a if isinstance(method, Scaled) else a, b, part, of_part
