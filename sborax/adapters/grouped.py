"""Adapters on rows that are sorted by expert: `grouped_linear` is `core.linear` for such rows."""

import abc
import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from sborax.adapters.compose import Chain, Scaled, Sum, part_context
from sborax.adapters.core import (
    HIDDEN,
    INPUT_DROPOUTS,
    OUTPUT_DROPOUTS,
    AbstractFactored,
    AbstractMethod,
    Adapter,
    Context,
    cast,
    pair_of,
)
from sborax.adapters.depth import over_stack
from sborax.adapters.grouped_matmul import (
    Sizes,
    add_matmul,
    branch_matmul,
    expert_of_row,
    grouped_matmul,
    tiles,
)
from sborax.adapters.weight import Weight, dense


class AbstractGrouped(AbstractMethod):
    """A method with a faster form for rows of many experts than the general ones of `grouped_linear`."""

    @abc.abstractmethod
    def apply_grouped(
        self,
        x: Float[Array, "rows in"],
        weight: Weight,
        sizes: Sizes,
        adapter: Adapter,
        ctx: Context,
    ) -> Float[Array, "rows out"]:
        """`apply` of every expert's weight and adapter on its rows. See `grouped_linear` for the arguments."""


class AbstractBranched(AbstractFactored):
    """A method of thin factors that `approximates`: its `branch` computes the product with the first factor."""

    @abc.abstractmethod
    def branch(
        self, x: Float[Array, "rows in"], sizes: Sizes, adapter: Adapter, ctx: Context
    ) -> tuple[Float[Array, "rows rank"], Float[Array, "experts rank out"]]:
        """The inputs of the second factor, and that factor, scale included. See `grouped_linear` for the arguments."""


def grouped_linear(
    x: Float[Array, "rows in"],
    weight: Weight,
    sizes: Sizes,
    adapter: Adapter | None = None,
    ctx: Context = Context(),
) -> Float[Array, "rows out"]:
    """`core.linear` of each row with the weight and the adapter of its expert.

    A method's declarations choose the form, in this order: its own (`AbstractGrouped`), its thin factors, its merged
    weights, and at last `apply` on tiles of rows that belong to one expert. In half precision, methods that scale the
    weight form its change beside it, or go by tiles.

    Args:
    - x: rows sorted by expert.
    - weight: (experts, in, out).
    - sizes: how many rows each expert has.
    - adapter: an adapter whose leaves have one stack axis, of experts; None for the base projection.
    - ctx: what the adapter reads. Arrays that belong to tokens have one entry a row.
    """
    if adapter is None:
        return grouped_matmul(x, weight, sizes)
    method = adapter.method.second if isinstance(adapter.method, Chain) else adapter.method
    if isinstance(method, AbstractGrouped):
        return method.apply_grouped(x, weight, sizes, adapter, ctx)
    if ctx.key is not None and (method.draws or _drops(adapter.frozen, OUTPUT_DROPOUTS)):
        return _by_tiles(x, weight, sizes, adapter, ctx)
    if _is_thin(method):
        x, branches = _thin(x, sizes, adapter, weight.shape[-2:], ctx)
        y = grouped_matmul(x, weight, sizes)
        for hidden, b in branches:
            y = add_matmul(y, hidden, b, sizes)
        return y
    drops = ctx.key is not None and _drops(adapter.frozen, INPUT_DROPOUTS)
    if method.no_merge or method.linked or method.approximates or drops:
        return _by_tiles(x, weight, sizes, adapter, ctx)
    if not method.scales_weight or x.dtype.itemsize >= 4:
        return grouped_matmul(x, _merged(weight, adapter, sizes, x.dtype), sizes)
    if method.materialises:
        # The change is formed once for each expert, where tiles would form it again and again.
        change = _merged(weight, adapter, sizes, x.dtype, change=True)
        return grouped_matmul(x, weight, sizes) + grouped_matmul(x, change, sizes)
    return _by_tiles(x, weight, sizes, adapter, ctx)


def _merged(
    weight: Weight, adapter: Adapter, sizes: Sizes, dtype: Any, change: bool = False
) -> Float[Array, "experts fan_in fan_out"]:
    """The merged weight of every expert that has rows, or its change, and zeros for the others."""

    def merge(matrix: Weight, node: Adapter, size: Array) -> Array:
        def compute() -> Array:
            merged = node.method.merge(matrix, node)
            return (merged - dense(matrix).astype(merged.dtype) if change else merged).astype(dtype)

        return jax.lax.cond(size > 0, compute, lambda: jnp.zeros(matrix.shape, dtype))

    return over_stack(merge, (sizes.experts,))(weight, adapter, sizes.rows)


def _is_thin(method: AbstractMethod) -> bool:
    """Whether the change of the weight as it is now is a product of thin factors."""
    if isinstance(method, Sum):
        return all(map(_is_thin, method.parts))
    if isinstance(method, Scaled):
        return _is_thin(method.part) and not method.part.rewrites_base
    if not isinstance(method, AbstractFactored) or method.no_merge or method.linked:
        return False
    return method.pair or not method.rewrites_base


def _thin(
    x: Float[Array, "rows in"], sizes: Sizes, adapter: Adapter, shape: tuple[int, ...], ctx: Context
) -> tuple[Float[Array, "rows in"], list[tuple[Float[Array, "rows rank"], Float[Array, "experts rank out"]]]]:
    """`x` for the base projection, and of every thin change the inputs of its second factor, and that factor."""
    method = adapter.method

    if isinstance(method, Sum):
        branches = []
        for part, (child, _) in enumerate(method.children(adapter)):
            x, further = _thin(x, sizes, child, shape, part_context(method, ctx, part))
            branches += further
        return x, branches
    if isinstance(method, Scaled):
        ((child, _),) = method.children(adapter)
        x, branches = _thin(x, sizes, child, shape, part_context(method, ctx, 0))
        return x, [(row_factors(adapter.frozen["factor"], sizes, hidden) * hidden, b) for hidden, b in branches]
    if isinstance(method, AbstractBranched):
        return x, [method.branch(x, sizes, adapter, ctx)]
    assert isinstance(method, AbstractFactored)
    if method.pair:
        # Not its `factors`: these also undo what the method took out of the base.
        scale, a, b = pair_of(adapter)
        a = scale[:, None, None] * a
    else:
        a, b = jax.vmap(lambda node: method.factors(node, (shape[0], shape[1])))(adapter)
    dropped = grouped_dropout(x, sizes, adapter, ctx)
    read, hidden = branch_matmul(dropped, cast(a, x), sizes)
    return read if dropped is x else x, [(checkpoint_name(hidden, HIDDEN), cast(b, x))]


def row_factors(
    leaf: Float[Array, "experts ..."], sizes: Sizes, like: Float[Array, "rows _"]
) -> Float[Array, "rows _"]:
    """The entry of each row's expert, of the shape and dtype of `like`. One number is spread over all features."""
    entries = cast(leaf, like)[expert_of_row(sizes, like.shape[0])]
    return jnp.broadcast_to(entries.reshape(like.shape[0], -1), like.shape)


def grouped_dropout(
    x: Float[Array, "rows in"], sizes: Sizes, adapter: Adapter, ctx: Context
) -> Float[Array, "rows in"]:
    """`core.dropout` at the rate of each row's expert."""
    if ctx.key is None or "dropout" not in adapter.frozen:
        return x
    keep = 1.0 - row_factors(adapter.frozen["dropout"], sizes, x.astype(jnp.float32))
    return jnp.where(jax.random.bernoulli(ctx.key, keep), x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def _drops(frozen: Any, leaves: Collection[str]) -> bool:
    """Whether an adapter drops something in training: whether it has one of the leaves that say how often."""
    keys = {jax.tree_util.DictKey(name) for name in leaves}
    return any(keys & set(path) for path, _ in jax.tree_util.tree_leaves_with_path(frozen))


def _by_tiles(
    x: Float[Array, "rows in"], weight: Weight, sizes: Sizes, adapter: Adapter, ctx: Context
) -> Float[Array, "rows out"]:
    """`apply` on one tile of rows after the other."""
    rows, tile = x.shape[0], sizes.tile(x.shape[0])
    total, place = tiles(sizes, tile)
    most = -(-rows // tile) + sizes.experts
    numbers = jnp.arange(most)
    experts, first, end = jax.vmap(place)(jnp.minimum(numbers, total - 1))
    places = first[:, None] + jnp.arange(tile)[None]
    # Rows beyond an expert's end, and whole tiles beyond the last, are read as zeros and written nowhere.
    places = jnp.where((places < end[:, None]) & (numbers < total)[:, None], places, rows)
    of_tile = jax.tree.map(lambda leaf: leaf[experts], adapter)

    def gathered(leaf: Array) -> Array:
        return leaf.at[places].get(mode="fill", fill_value=0)

    per_row = gathered(x), dataclasses.replace(ctx, key=None).map(gathered)

    def apply(_: None, tiles: Any) -> tuple[None, Array]:
        number, expert, node, (x, of_rows) = tiles
        key = None if ctx.key is None else jax.random.fold_in(ctx.key, number)

        def multiply() -> Array:
            matrix = jax.tree.map(lambda leaf: leaf[expert], weight)
            return node.method.apply(x, matrix, node, dataclasses.replace(of_rows, key=key))

        return None, jax.lax.cond(number < total, multiply, lambda: jnp.zeros((tile, weight.shape[-1]), x.dtype))

    _, products = jax.lax.scan(apply, None, (numbers, experts, of_tile, per_row))
    y = jnp.zeros((rows, products.shape[-1]), products.dtype)
    return y.at[places].set(products, mode="drop")
