"""Products of rows that are sorted by expert with a stack of weights, one weight an expert, and their gradients.

`grouped_matmul` is `weight.matmul` for such rows. No row is dropped or computed twice, and no value has an axis of
experts beside one of rows.

Adapters are branches: they read the input of a projection and add to its output. The functions named `branch_` and
`add_` do so without a pass over all rows of their own, in the forward pass or in the backward pass.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sborax.adapters import grouped_tpu
from sborax.adapters.experts import DISTINCT
from sborax.adapters.weight import AbstractWeight, Weight, dense

LEAST_TILE, LARGEST_TILE = 8, 256
"""Bounds of the rows that are multiplied at once where the back end has no grouped product."""
PARTS, LEAST_PART = 4, 32
"""Parts of a tile, and the least rows of a part. Where an expert ends, the parts after its last row are left out."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many rows each expert has.

    - rows: by expert. Rows beyond their sum belong to no expert: what is computed of them is undefined.
    - room: how many rows there is room for, as a multiple of those at balanced load.
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


def expert_of_row(sizes: Sizes, rows: int) -> Int[Array, " rows"]:
    """The expert of every row."""
    return jnp.repeat(jnp.arange(sizes.experts, dtype=jnp.int32), sizes.rows, total_repeat_length=rows)


def tiles(sizes: Sizes, tile: int) -> tuple[Array, Any]:
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


def _leading_product(x: Float[Array, "tile in"], matrix: Float[Array, "in out"], count: Array) -> Array:
    """x W of the first `count` rows. Of the others, whole parts of the tile are not multiplied and are zero."""
    tile = x.shape[0]
    part = tile // PARTS
    if part < LEAST_PART:
        return x @ matrix

    def leading(rows: int) -> Callable[[], Array]:
        return lambda: jnp.pad(x[:rows] @ matrix, ((0, tile - rows), (0, 0)))

    parts = jnp.clip(-(-count // part), 1, PARTS)
    return jax.lax.switch(parts - 1, [leading(number * part) for number in range(1, PARTS + 1)])


def _tiled_product(
    x: Float[Array, "rows in"], weight: Weight, sizes: Sizes, transposed: bool, onto: Array | None = None
) -> Array:
    """Each row times the weight of its expert, or times its transpose, one tile after the other, added to `onto`."""
    rows, tile = x.shape[0], sizes.tile(x.shape[0])
    total, place = tiles(sizes, tile)

    def multiply(number: Array, y: Array) -> Array:
        expert, first, end = place(number)
        # The last tile may begin earlier than its expert, so that it lies within the array: padding would copy it.
        start = jnp.minimum(first, rows - tile)
        matrix = dense(jax.tree.map(lambda leaf: leaf[expert], weight)).astype(x.dtype)
        block = jax.lax.dynamic_slice_in_dim(x, start, tile)
        product = _leading_product(block, matrix.T if transposed else matrix, end - start)
        row, previous = start + jnp.arange(tile), jax.lax.dynamic_slice_in_dim(y, start, tile)
        if onto is None:
            # Rows of the next expert that are in this tile are computed wrongly here, and overwritten by the next tile.
            product = jnp.where((row < first)[:, None], previous, product)
        else:
            product = jnp.where(((row >= first) & (row < end))[:, None], previous + product, previous)
        return jax.lax.dynamic_update_slice_in_dim(y, product, start, 0)

    features = weight.shape[-2 if transposed else -1]
    return jax.lax.fori_loop(0, total, multiply, jnp.zeros((rows, features), x.dtype) if onto is None else onto)


def _tiled_outer(x: Float[Array, "rows in"], g: Float[Array, "rows out"], sizes: Sizes) -> Array:
    rows, tile = x.shape[0], sizes.tile(x.shape[0])
    total, place = tiles(sizes, tile)
    # XLA:CPU multiplies a thin transposed operand by a wide one several times as fast as the reverse.
    swap = x.shape[1] > g.shape[1]
    left, right = (g, x) if swap else (x, g)

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
    return jnp.swapaxes(sums, 1, 2) if swap else sums


@jax.custom_batching.sequential_vmap
def _product(x: Float[Array, "rows in"], weight: Weight, sizes: Sizes) -> Float[Array, "rows out"]:
    """Each row times the weight of its expert. Members of a sweep take turns, since each routes its own rows."""
    return _platform_product(x, weight, sizes, transposed=False)


@jax.custom_batching.sequential_vmap
def _product_transposed(g: Float[Array, "rows out"], weight: Weight, sizes: Sizes) -> Float[Array, "rows in"]:
    return _platform_product(g, weight, sizes, transposed=True)


@jax.custom_batching.sequential_vmap
def _product_onto(y: Array, x: Array, weight: Weight, sizes: Sizes) -> Float[Array, "rows out"]:
    return _platform_product(x, weight, sizes, transposed=False, onto=y)


@jax.custom_batching.sequential_vmap
def _product_transposed_onto(y: Array, g: Array, weight: Weight, sizes: Sizes) -> Float[Array, "rows in"]:
    return _platform_product(g, weight, sizes, transposed=True, onto=y)


def _platform_product(x: Array, weight: Weight, sizes: Sizes, transposed: bool, onto: Array | None = None) -> Array:
    def native(x: Array, weight: Weight, sizes: Sizes, onto: Array | None) -> Array:
        product = grouped_tpu.product(x, dense(weight).astype(x.dtype), sizes.rows, transposed)
        return product if onto is None else onto + product

    def tiled(x: Array, weight: Weight, sizes: Sizes, onto: Array | None) -> Array:
        return _tiled_product(x, weight, sizes, transposed, onto)

    return jax.lax.platform_dependent(x, weight, sizes, onto, tpu=native, default=tiled)


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


@jax.custom_vjp
def branch_matmul(
    x: Float[Array, "rows in"], weight: Float[Array, "experts fan_in fan_out"], sizes: Sizes
) -> tuple[Float[Array, "rows in"], Float[Array, "rows out"]]:
    """`x` itself, and y[i] = x[i] W[e(i)]. The gradient of y is added tile by tile to that of the former.

    See `grouped_matmul` for the arguments.
    """
    return x, _product(x, weight, sizes)


def _branch_forward(x: Array, weight: Array, sizes: Sizes) -> tuple[tuple[Array, Array], Any]:
    return branch_matmul(x, weight, sizes), (x, weight, sizes)


def _branch_backward(saved: Any, g: tuple[Array, Array]) -> tuple[Array, Array, None]:
    x, weight, sizes = saved
    main, branch = g
    slope = _outer(x, branch, sizes).astype(weight.dtype)
    return _product_transposed_onto(main, branch, weight, sizes), slope, None


branch_matmul.defvjp(_branch_forward, _branch_backward)


@jax.custom_vjp
def add_matmul(
    y: Float[Array, "rows out"],
    x: Float[Array, "rows in"],
    weight: Float[Array, "experts fan_in fan_out"],
    sizes: Sizes,
) -> Float[Array, "rows out"]:
    """y[i] + x[i] W[e(i)], tile by tile. See `grouped_matmul` for the arguments."""
    return _product_onto(y, x, weight, sizes)


def _add_forward(y: Array, x: Array, weight: Array, sizes: Sizes) -> tuple[Array, Any]:
    return add_matmul(y, x, weight, sizes), (x, weight, sizes)


def _add_backward(saved: Any, g: Array) -> tuple[Array, Array, Array, None]:
    return g, *_trained_backward(saved, g)


add_matmul.defvjp(_add_forward, _add_backward)


@jax.custom_vjp
def branch_columns(
    x: Float[Array, "rows in"], columns: Int[Array, "experts rank"], sizes: Sizes
) -> tuple[Float[Array, "rows in"], Float[Array, "rows rank"]]:
    """`x` itself, and y[i, r] = x[i, columns[e(i), r]]. The gradient of y is added in place to that of the former.

    Args:
    - x: rows sorted by expert.
    - columns: distinct and ascending for each expert.
    - sizes: how many rows each expert has.
    """
    return x, _columns(x, columns, sizes)


def _branch_columns_forward(x: Array, columns: Array, sizes: Sizes) -> tuple[tuple[Array, Array], Any]:
    return branch_columns(x, columns, sizes), (columns, sizes)


def _branch_columns_backward(saved: Any, g: tuple[Array, Array]) -> tuple[Array, None, None]:
    return _columns_onto(*g, *saved), None, None


branch_columns.defvjp(_branch_columns_forward, _branch_columns_backward)


@jax.custom_vjp
def add_columns(
    y: Float[Array, "rows out"], x: Float[Array, "rows rank"], columns: Int[Array, "experts rank"], sizes: Sizes
) -> Float[Array, "rows out"]:
    """`y` with x[i, r] added to y[i, columns[e(i), r]]. See `branch_columns` for the arguments."""
    return _columns_onto(y, x, columns, sizes)


def _add_columns_forward(y: Array, x: Array, columns: Array, sizes: Sizes) -> tuple[Array, Any]:
    return add_columns(y, x, columns, sizes), (columns, sizes)


def _add_columns_backward(saved: Any, g: Array) -> tuple[Array, Array, None, None]:
    return g, _columns(g, *saved), None, None


add_columns.defvjp(_add_columns_forward, _add_columns_backward)


def _columns(x: Array, columns: Array, sizes: Sizes) -> Array:
    def product(x: Array, columns: Array, sizes: Sizes) -> Array:
        # A TPU reads and writes single entries slowly.
        return _product(x, jax.nn.one_hot(columns, x.shape[1], axis=1, dtype=x.dtype), sizes)

    def entries(x: Array, columns: Array, sizes: Sizes) -> Array:
        return x.at[_entries(columns, sizes, x.shape[0])].get(**DISTINCT)

    return jax.lax.platform_dependent(x, columns, sizes, tpu=product, default=entries)


def _columns_onto(y: Array, x: Array, columns: Array, sizes: Sizes) -> Array:
    def product(y: Array, x: Array, columns: Array, sizes: Sizes) -> Array:
        return _product_onto(y, x, jax.nn.one_hot(columns, y.shape[1], axis=2, dtype=x.dtype), sizes)

    def entries(y: Array, x: Array, columns: Array, sizes: Sizes) -> Array:
        return y.at[_entries(columns, sizes, y.shape[0])].add(x, **DISTINCT)

    return jax.lax.platform_dependent(y, x, columns, sizes, tpu=product, default=entries)


def _entries(columns: Array, sizes: Sizes, rows: int) -> tuple[Array, Array]:
    """Row and column of the entries of `columns` in an array of so many rows."""
    return jnp.arange(rows, dtype=jnp.int32)[:, None], columns[expert_of_row(sizes, rows)]
