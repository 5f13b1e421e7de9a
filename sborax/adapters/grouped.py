"""Products of rows that are sorted by expert with a stack of weights, one weight an expert.

`grouped_matmul` is `weight.matmul` and `grouped_linear` is `core.linear` for such rows. No row is dropped or computed
twice, and no value has an axis of experts beside one of rows.
"""

import abc
import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from sborax.adapters import grouped_tpu
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
)
from sborax.adapters.depth import over_stack
from sborax.adapters.weight import AbstractWeight, Weight, dense

LEAST_TILE, LARGEST_TILE = 8, 256
"""Bounds of the rows that are multiplied at once where the back end has no grouped product."""
PARTS, LEAST_PART = 4, 32
"""Into how many parts a tile is cut, of which the last are left out where an expert ends, and the least rows of one."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many rows each expert has.

    - rows: by expert. Rows beyond their sum belong to no expert: what is computed of them is undefined.
    - room: how many times as many rows as at balanced load there is room for.
    """

    # Any: a pytree node also holds shapes.
    rows: Any
    room: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def experts(self) -> int:
        """The number of experts."""
        return self.rows.shape[-1]

    def tile(self, rows: int) -> int:
        """Rows of a tile of an array of so many rows.

        It is the power of two that is at most half the rows of an expert at balanced load, within bounds. An expert's
        last tile may be partly empty, so smaller tiles compute less in vain, and larger ones run faster.
        """
        half = max(1, rows // self.room // (2 * self.experts))
        return min(rows, LARGEST_TILE, max(LEAST_TILE, 1 << (half.bit_length() - 1)))


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


def expert_of_row(sizes: Sizes, rows: int) -> Int[Array, " rows"]:
    """The expert of every row."""
    return jnp.repeat(jnp.arange(sizes.experts, dtype=jnp.int32), sizes.rows, total_repeat_length=rows)


def _tiles(sizes: Sizes, tile: int) -> tuple[Array, Any]:
    """The number of tiles, and a function of a tile's number: its expert, its first row, and its expert's end."""
    ends = jnp.cumsum(sizes.rows)
    counts = -(-sizes.rows // tile)
    last = jnp.cumsum(counts)

    def place(number: Array) -> tuple[Array, Array, Array]:
        # A search would be a loop inside the loop.
        expert = jnp.sum(last <= number)
        within = number - (last[expert] - counts[expert])
        return expert, ends[expert] - sizes.rows[expert] + within * tile, ends[expert]

    return last[-1], place


def _leading_product(x: Float[Array, "tile in"], matrix: Float[Array, "in out"], wanted: Array) -> Array:
    """x W of the first `wanted` rows. Of the others, whole parts of the tile are not multiplied and are zero."""
    tile = x.shape[0]
    part = tile // PARTS
    if part < LEAST_PART:
        return x @ matrix

    def leading(rows: int) -> Callable[[], Array]:
        return lambda: jnp.pad(x[:rows] @ matrix, ((0, tile - rows), (0, 0)))

    parts = jnp.clip(-(-wanted // part), 1, PARTS)
    return jax.lax.switch(parts - 1, [leading(number * part) for number in range(1, PARTS + 1)])


def _tiled_product(x: Float[Array, "rows in"], weight: Weight, sizes: Sizes, transposed: bool) -> Array:
    """Each row times the weight of its expert, or times its transpose, one tile after the other."""
    rows, tile = x.shape[0], sizes.tile(x.shape[0])
    total, place = _tiles(sizes, tile)

    def multiply(number: Array, y: Array) -> Array:
        expert, first, end = place(number)
        # The last tile may begin earlier than its expert, so that it lies within the array: padding would copy it.
        start = jnp.minimum(first, rows - tile)
        matrix = dense(jax.tree.map(lambda leaf: leaf[expert], weight)).astype(x.dtype)
        taken = jax.lax.dynamic_slice_in_dim(x, start, tile)
        product = _leading_product(taken, matrix.T if transposed else matrix, end - start)
        # Rows of the next expert that are in this tile are computed wrongly here, and overwritten by the next tile.
        earlier = (start + jnp.arange(tile) < first)[:, None]
        product = jnp.where(earlier, jax.lax.dynamic_slice_in_dim(y, start, tile), product)
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0)

    features = weight.shape[-2 if transposed else -1]
    return jax.lax.fori_loop(0, total, multiply, jnp.zeros((rows, features), x.dtype))


def _tiled_outer(x: Float[Array, "rows in"], g: Float[Array, "rows out"], sizes: Sizes) -> Array:
    rows, tile = x.shape[0], sizes.tile(x.shape[0])
    total, place = _tiles(sizes, tile)
    # XLA:CPU multiplies a thin transposed operand by a wide one several times as fast as the reverse.
    turned = x.shape[1] > g.shape[1]
    left, right = (g, x) if turned else (x, g)

    def add(number: Array, sums: Array) -> Array:
        expert, first, end = place(number)
        start = jnp.minimum(first, rows - tile)
        row = start + jnp.arange(tile)
        live = ((row >= first) & (row < end))[:, None]
        thin = jnp.where(live, jax.lax.dynamic_slice_in_dim(left, start, tile), jnp.zeros((), left.dtype))
        wide = jax.lax.dynamic_slice_in_dim(right, start, tile)
        return sums.at[expert].add(jnp.matmul(thin.T, wide, preferred_element_type=jnp.float32))

    sums = jnp.zeros((sizes.experts, left.shape[1], right.shape[1]), jnp.float32)
    sums = jax.lax.fori_loop(0, total, add, sums)
    return jnp.swapaxes(sums, 1, 2) if turned else sums


@jax.custom_batching.sequential_vmap
def _product(x: Float[Array, "rows in"], weight: Weight, sizes: Sizes) -> Float[Array, "rows out"]:
    """Each row times the weight of its expert. Members of a sweep take turns, since each routes its own rows."""
    return _platform_product(x, weight, sizes, transposed=False)


@jax.custom_batching.sequential_vmap
def _product_transposed(g: Float[Array, "rows out"], weight: Weight, sizes: Sizes) -> Float[Array, "rows in"]:
    return _platform_product(g, weight, sizes, transposed=True)


def _platform_product(x: Array, weight: Weight, sizes: Sizes, transposed: bool) -> Array:
    def native(x: Array, weight: Weight, sizes: Sizes) -> Array:
        return grouped_tpu.product(x, dense(weight).astype(x.dtype), sizes.rows, transposed)

    def tiled(x: Array, weight: Weight, sizes: Sizes) -> Array:
        return _tiled_product(x, weight, sizes, transposed)

    return jax.lax.platform_dependent(x, weight, sizes, tpu=native, default=tiled)


@jax.custom_batching.sequential_vmap
def _outer(
    x: Float[Array, "rows in"], g: Float[Array, "rows out"], sizes: Sizes
) -> Float[Array, "experts fan_in fan_out"]:
    """x^T g over the rows of each expert, float32."""

    def native(x: Array, g: Array, sizes: Sizes) -> Array:
        return grouped_tpu.outer(x, g, sizes.rows)

    return jax.lax.platform_dependent(x, g, sizes, tpu=native, default=_tiled_outer)


@jax.custom_vjp
def _trained_product(
    x: Float[Array, "rows in"], weight: Float[Array, "experts fan_in fan_out"], sizes: Sizes
) -> Float[Array, "rows out"]:
    return _product(x, weight, sizes)


def _trained_forward(x: Array, weight: Array, sizes: Sizes) -> tuple[Array, Any]:
    return _trained_product(x, weight, sizes), (x, weight, sizes)


def _trained_backward(saved: Any, g: Array) -> tuple[Array, Array, None]:
    x, weight, sizes = saved
    return _product_transposed(g, weight, sizes), _outer(x, g, sizes).astype(weight.dtype), None


_trained_product.defvjp(_trained_forward, _trained_backward)


@jax.custom_vjp
def _frozen_product(x: Array, weight: AbstractWeight, sizes: Sizes) -> Array:
    return _product(x, weight, sizes)


def _frozen_forward(x: Array, weight: AbstractWeight, sizes: Sizes) -> tuple[Array, Any]:
    return _frozen_product(x, weight, sizes), (weight, sizes)


def _frozen_backward(saved: Any, g: Array) -> tuple[Array, None, None]:
    # Without the barrier the compiler would keep the dense weights of the forward pass until here.
    weight, sizes, g = jax.lax.optimization_barrier((*saved, g))
    return _product_transposed(g, weight, sizes), None, None


_frozen_product.defvjp(_frozen_forward, _frozen_backward)


def grouped_matmul(x: Float[Array, "rows in"], weight: Weight, sizes: Sizes) -> Float[Array, "rows out"]:
    """y[i] = x[i] W[e(i)] in the dtype of `x`, e(i) the expert of row i.

    Args:
    - x: rows sorted by expert.
    - weight: (experts, in, out), a plain array or a quantised one, which is made dense one expert at a time and gets no
      gradient.
    - sizes: how many rows each expert has.
    """
    if isinstance(weight, AbstractWeight):
        return _frozen_product(x, weight, sizes)
    return _trained_product(x, weight, sizes)


def grouped_linear(
    x: Float[Array, "rows in"],
    weight: Weight,
    sizes: Sizes,
    adapter: Adapter | None = None,
    ctx: Context = Context(),
) -> Float[Array, "rows out"]:
    """`core.linear` of each row with the weight and the adapter of its expert.

    A method's declarations choose the form, in this order: its own (`AbstractGrouped`), its thin factors, its merged
    weights, and at last `apply` on tiles of rows that belong to one expert.

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
        return _add_thin(grouped_matmul(x, weight, sizes), x, sizes, adapter, weight.shape[-2:], ctx)
    if not method.no_merge and not method.linked and (ctx.key is None or not _drops(adapter.frozen, INPUT_DROPOUTS)):
        return grouped_matmul(x, _merged(weight, adapter, sizes, x.dtype), sizes)
    return _by_tiles(x, weight, sizes, adapter, ctx)


def _merged(weight: Weight, adapter: Adapter, sizes: Sizes, dtype: Any) -> Float[Array, "experts fan_in fan_out"]:
    """The merged weight of every expert that has rows, and zeros for the others."""

    def merge(matrix: Weight, node: Adapter, size: Array) -> Array:
        def used() -> Array:
            return node.method.merge(matrix, node).astype(dtype)

        return jax.lax.cond(size > 0, used, lambda: jnp.zeros(matrix.shape, dtype))

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


def _add_thin(
    y: Float[Array, "rows out"],
    x: Float[Array, "rows in"],
    sizes: Sizes,
    adapter: Adapter,
    shape: tuple[int, ...],
    ctx: Context,
) -> Float[Array, "rows out"]:
    method = adapter.method

    if isinstance(method, Sum):
        for part, (child, _) in enumerate(method.children(adapter)):
            y = _add_thin(y, x, sizes, child, shape, part_context(method, ctx, part))
        return y
    if isinstance(method, Scaled):
        ((child, _),) = method.children(adapter)
        delta = _add_thin(jnp.zeros_like(y), x, sizes, child, shape, part_context(method, ctx, 0))
        return y + row_factors(adapter.frozen["factor"], sizes, y) * delta
    assert isinstance(method, AbstractFactored)
    x = grouped_dropout(x, sizes, adapter, ctx)
    if method.pair:
        # Not its `factors`: these also undo what the method took out of the base.
        a, b = adapter.frozen["scale"][:, None, None] * adapter.train["a"], adapter.train["b"]
    else:
        a, b = jax.vmap(lambda node: method.factors(node, (shape[0], shape[1])))(adapter)
    hidden = checkpoint_name(grouped_matmul(x, cast(a, x), sizes), HIDDEN)
    return y + grouped_matmul(hidden, cast(b, x), sizes)


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
    total, place = _tiles(sizes, tile)
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

        def used() -> Array:
            matrix = jax.tree.map(lambda leaf: leaf[expert], weight)
            return node.method.apply(x, matrix, node, dataclasses.replace(of_rows, key=key))

        return None, jax.lax.cond(number < total, used, lambda: jnp.zeros((tile, weight.shape[-1]), x.dtype))

    _, products = jax.lax.scan(apply, None, (numbers, experts, of_tile, per_row))
    y = jnp.zeros((rows, products.shape[-1]), products.dtype)
    return y.at[places].set(products, mode="drop")
