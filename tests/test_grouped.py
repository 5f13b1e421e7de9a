"""Rows sorted by expert: every method's grouped form equals a loop over experts with `linear`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import assert_close, base, fitted, host, largest, linear, masks, normal, trained
from cases import IN, METHODS, OUT, Case, context_for
from nightly import nightly_unless

import sborax as sx
from sborax.adapters import grouped_tpu
from sborax.adapters.compose import ByLayer, Chain
from sborax.adapters.core import AbstractAdditive, AbstractComposite, AbstractFactored, dense
from sborax.adapters.grouped import AbstractBranched, AbstractGrouped, grouped_linear
from sborax.adapters.grouped_matmul import (
    LEAST_PART,
    PARTS,
    Sizes,
    _tiled_outer,
    _tiled_product,
    add_columns,
    add_matmul,
    branch_columns,
    branch_matmul,
    grouped_matmul,
)

pytestmark = pytest.mark.usefixtures("strict")

SIZES = (5, 0, 14)
"""An expert without rows, one with more than a tile, and a tile that begins within a group of eight."""
ROWS = sum(SIZES)
by_base = pytest.mark.parametrize(
    "quantised", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["f32", "nf4"]
)


def sizes_of(counts) -> Sizes:
    return Sizes(jnp.asarray(counts))


def rows(seed: int = 7) -> jax.Array:
    return jnp.asarray(normal(seed, ROWS, IN))


def by_expert(x, weight, node=None):
    """What a loop over experts computes."""
    ends = np.cumsum(SIZES)
    outputs = []
    for expert, (end, size) in enumerate(zip(ends, SIZES, strict=True)):
        if not size:
            continue
        matrix, adapter = jax.tree.map(lambda leaf, expert=expert: leaf[expert], (weight, node))
        outputs.append(
            linear(x[end - size : end], matrix, adapter) if adapter else sx.linear(x[end - size : end], matrix)
        )
    return jnp.concatenate(outputs)


@functools.partial(jax.jit, static_argnames="product")
def with_gradients(product, x, weight, node, cotangent):
    def loss(x, train):
        y = product(x, weight, sx.Adapter(train, node.frozen, node.method, node.in_axes))
        return jnp.sum(y * cotangent), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, node.train)
    return y, grads


def grouped(x, weight, node):
    return grouped_linear(x, weight, sizes_of(SIZES), node, context_for([node.method], x))


ON_EXPERTS = [case for case in METHODS if not case.method.token_mean]
MASKED = [case for case in ON_EXPERTS if masks(case.method) & fitted(case.method)[1].frozen.keys()]
FORMS = (AbstractGrouped, AbstractBranched, AbstractFactored, AbstractComposite, Chain)
FEW = {
    (bool(case.method.no_merge), *(isinstance(case.method, form) for form in FORMS), case in MASKED): case
    for case in reversed(ON_EXPERTS)
}.values()
"""A row of every form and one with masks, of those that `grouped_linear` tells apart."""


@by_base
@pytest.mark.parametrize("case", nightly_unless(FEW, ON_EXPERTS), ids=lambda case: case.name)
def test_grouped_rows_equal_a_loop_over_experts(case: Case, quantised):
    weight, node = fitted(case.method, quantised=quantised)
    node, cotangent = trained(node), jnp.asarray(normal(8, ROWS, OUT))
    ours, theirs = (with_gradients(product, rows(), weight, node, cotangent) for product in (grouped, by_expert))
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        # Without a key, leaves of draws alone have no gradient.
        assert largest(expected) > 0 or case.method.draws
        assert_close(mine, expected, 1e-5)


MERGED = [case for case in ON_EXPERTS if not (case.method.no_merge or case.method.linked or case.method.approximates)]
OF_WEIGHT = {
    f"{case.name} by layer": ByLayer((case.method,), ((0, 1, 2),)) for case in ON_EXPERTS if case.name == "HiRA"
}
ROWS_EACH = 64


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=[pytest.mark.nightly] * (not method.scales_weight and name != "LoKr"))
        for name, method in [*((case.name, case.method) for case in MERGED), *OF_WEIGHT.items()]
    ],
)
def test_a_small_change_acts_on_experts_as_on_a_kernel(method):
    """In half precision. A weight that is merged and rounded has lost what is small beside its entries."""
    weight, start = fitted(method, "bfloat16")
    end, ends = trained(start).train, range(ROWS_EACH, 4 * ROWS_EACH, ROWS_EACH)
    x, sizes = jnp.asarray(normal(4, 3 * ROWS_EACH, IN), "bfloat16"), sizes_of((ROWS_EACH,) * 3)

    def loop(product, weight, node):
        return jnp.concatenate(
            [
                product(x[end - ROWS_EACH : end], *jax.tree.map(lambda leaf, i=i: leaf[i], (weight, node)))
                for i, end in enumerate(ends)
            ]
        )

    @jax.jit
    def by_rows(weight, node):
        return grouped_linear(x, weight, sizes, node, context_for([node.method], x))

    by_kernel = jax.jit(functools.partial(loop, linear))
    in_float32 = jax.jit(functools.partial(loop, lambda x, w, node: x.astype(jnp.float32) @ node.method.merge(w, node)))

    def moved(step: float):
        train = jax.tree.map(lambda old, new: old + np.float32(step) * (new - old), start.train, end)
        return dataclasses.replace(start, train=train)

    def change(product, step: float):
        return host(product(weight, moved(step))) - host(product(weight, start))

    step, size = 1.0, 1e-3 * np.linalg.norm(host(by_kernel(weight, start)))
    for _ in range(6):
        step *= (size / np.linalg.norm(change(in_float32, step))) ** 0.8
    expected = change(in_float32, step)
    on_experts, on_kernel = (
        np.sum(change(product, step) * expected) / np.sum(expected**2) for product in (by_rows, by_kernel)
    )
    assert on_experts > on_kernel - 0.3, f"{on_experts:.2f} of the change is applied, and {on_kernel:.2f} to kernels"


COMPOSED = {
    case.name: sx.scale(sx.add(case.method, sx.LoRA(rank=2)), 0.5)
    for case in ON_EXPERTS
    if isinstance(case.method, AbstractAdditive) and not case.method.rewrites_base
}
LAYERED = {
    f"{case.name} by layer": ByLayer((case.method, sx.LoRA(rank=2)), ((0, 1), (2,)))
    for case in ON_EXPERTS
    # In rows of a tile, this one's direction is that of the tile.
    if not (case.method.rewrites_base or case.method.batch_gradient)
}


@pytest.mark.parametrize(
    "name", nightly_unless(["VeLoRA", "VeLoRA-fixed", "VeLoRA-fixed by layer", "DoRA by layer"], [*COMPOSED, *LAYERED])
)
def test_parts_of_composed_methods_have_the_gradients_that_they_have_alone(name):
    method = {**COMPOSED, **LAYERED}[name]
    weight, node = fitted(method)
    node, cotangent = trained(node), jnp.asarray(normal(8, ROWS, OUT))
    ours, theirs = (with_gradients(product, rows(), weight, node, cotangent) for product in (grouped, by_expert))
    jax.tree.map(lambda mine, expected: assert_close(mine, expected, 2e-5), ours, theirs)


DRAWING = [case for case in METHODS if case.method.draws or hasattr(case.method, "dropout")]
KINDS = {
    (bool(case.method.draws), isinstance(case.method, AbstractGrouped), isinstance(case.method, AbstractFactored)): case
    for case in reversed(DRAWING)
}


@pytest.mark.parametrize("case", KINDS.values(), ids=lambda case: case.name)
def test_what_is_drawn_is_drawn_in_rows_of_experts_too(case: Case):
    """With a key, and not without one: noise, and dropout before thin factors, in a method's own form and in tiles."""
    method = case.method if case.method.draws else dataclasses.replace(case.method, dropout=0.5)
    weight, node = fitted(method)
    node = trained(node)

    def product(key):
        return grouped_linear(rows(), weight, sizes_of(SIZES), node, sx.Context(key=key))

    first, second, third, without = map(
        jax.jit(product), (jax.random.key(1), jax.random.key(1), jax.random.key(2), None)
    )
    assert jnp.array_equal(first, second)
    changed = np.abs(np.asarray(first - third)).max(axis=1) > 1e-4
    assert changed.all() and largest(first - without) > 1e-4


@pytest.mark.parametrize(
    "method",
    [sx.LoHa(rank=3, rank_dropout=0.5), sx.LoHa(rank=3, module_dropout=0.5), sx.BOFT(2, block_dropout=0.5)],
    ids=["outputs", "changes", "blocks"],
)
def test_other_dropouts_drop_in_rows_of_experts_too(method):
    weight, node = fitted(method)
    node = trained(node)

    def product(key):
        return grouped_linear(rows(), weight, sizes_of(SIZES), node, sx.Context(key=key))

    without, *outputs = (product(key) for key in (None, *jax.random.split(jax.random.key(0), 6)))
    assert any(largest(without - y) > 1e-4 for y in outputs)
    assert any(largest(y - outputs[0]) > 1e-4 for y in outputs)


@pytest.mark.parametrize("quantised", [False, True], ids=["f32", "nf4"])
def test_plain_rows_equal_a_loop_over_experts(quantised):
    weight = base(quantised=quantised)
    y = jax.jit(grouped_matmul)(rows(), weight, sizes_of(SIZES))
    assert_close(y, by_expert(rows(), dense(weight)), 1e-6)


def test_a_trained_stack_has_the_gradient_of_each_expert():
    cotangent = jnp.asarray(normal(8, ROWS, OUT))

    def gradient(product):
        return jax.jit(jax.grad(lambda weight: jnp.sum(product(weight) * cotangent)))(base())

    ours = gradient(lambda weight: grouped_matmul(rows(), weight, sizes_of(SIZES)))
    assert_close(ours, gradient(lambda weight: by_expert(rows(), weight)), 1e-6)
    assert not np.asarray(ours[1]).any()


@pytest.mark.parametrize(
    ("counts", "rows", "fan_in", "fan_out", "dtype"),
    [
        ((7, 0, 20, 13), 50, 24, 40, jnp.float32),
        # Tiles that hold rows of several experts, features of more than one tile, rows of a rank.
        pytest.param((500, 0, 513, 187), 1300, 600, 16, jnp.float32, marks=pytest.mark.nightly),
        pytest.param((7, 0, 20, 13), 50, 24, 40, jnp.bfloat16, marks=pytest.mark.nightly),
    ],
)
def test_the_kernels_of_a_tpu_equal_tiles(counts, rows, fan_in, fan_out, dtype):
    """Interpreted on a CPU. Rows that belong to no expert are undefined."""
    sizes, live = sizes_of(counts), sum(counts)
    x, g = (jnp.asarray(normal(seed, rows, side), dtype) for seed, side in ((1, fan_in), (2, fan_out)))
    weight = jnp.asarray(normal(3, len(counts), fan_in, fan_out), dtype)
    kernel = functools.partial(grouped_tpu.product, weight=weight, sizes=sizes.rows, interpret=True)
    for output, expected in (
        (kernel(x)[:live], _tiled_product(x, weight, sizes, False)[:live]),
        (kernel(g, transposed=True)[:live], _tiled_product(g, weight, sizes, True)[:live]),
        (grouped_tpu.outer(x, g, sizes.rows, interpret=True), _tiled_outer(x, g, sizes)),
    ):
        assert output.dtype == expected.dtype
        assert_close(output.astype(jnp.float32), expected.astype(jnp.float32), 1e-5 if dtype == jnp.float32 else 1e-2)


def test_members_of_a_sweep_may_route_their_rows_apart():
    sizes = sizes_of([SIZES, (19, 0, 0), (1, 2, 16)])
    x = jnp.asarray(normal(4, 3, ROWS, IN))
    together = jax.jit(jax.vmap(grouped_matmul, (0, None, 0)))(x, base(), sizes)
    for number in range(3):
        assert_close(together[number], grouped_matmul(x[number], base(), sizes_of(sizes.rows[number])), 1e-6)


@pytest.mark.parametrize(("count", "experts", "tile"), [(8, 64, 8), (512, 8, 32), (16384, 8, 256)])
def test_tiles_at_balanced_load_are_full(count, experts, tile):
    assert sizes_of([0] * experts).tile(count) == tile and (count // experts) % tile in (0, count // experts)


@pytest.mark.parametrize("counts", [(0, 33, 517, 50), (300, 300, 0, 0), (600, 0, 0, 0), (1, 2, 3, 4)], ids=str)
def test_the_end_of_an_expert_is_multiplied_in_part(counts):
    assert sizes_of(counts).tile(1024) // PARTS >= LEAST_PART
    sizes, total = sizes_of(counts), sum(counts)
    x, g, weight = (jnp.asarray(normal(seed, *shape)) for seed, shape in enumerate([(1024, 6), (1024, 5), (4, 6, 5)]))
    experts = np.repeat(np.arange(4), counts)
    y = _tiled_product(x, weight, sizes, transposed=False)[:total]
    assert_close(y, jnp.einsum("ri,rio->ro", x[:total], weight[experts]), 1e-6)
    back = _tiled_product(g, weight, sizes, transposed=True)[:total]
    assert_close(back, jnp.einsum("ro,rio->ri", g[:total], weight[experts]), 1e-6)
    live = np.eye(4, dtype=np.float32)[experts]
    assert_close(_tiled_outer(x, g, sizes), jnp.einsum("re,ri,ro->eio", live, x[:total], g[:total]), 1e-5)


def test_branches_equal_what_they_read_and_add():
    """Products and columns that lie beside a projection, and the gradients that are added to it tile by tile."""
    counts = (5, 0, 14)
    sizes, experts = sizes_of(counts), np.repeat(np.arange(3), counts)
    # Two rows belong to no expert.
    x, y = jnp.asarray(normal(1, ROWS + 2, 6)), jnp.asarray(normal(2, ROWS + 2, 6))
    weight, columns = jnp.asarray(normal(3, 3, 6, 6)), jnp.asarray([[0, 2], [1, 5], [3, 4]])
    spread = jax.nn.one_hot(columns, 6, axis=1)

    def live(*arrays):
        return sum(jnp.sum(jnp.sin(array[:ROWS]) * (1 + number)) for number, array in enumerate(arrays))

    def reference(x, y, weight):
        product = jnp.einsum("ri,rio->ro", x[:ROWS], weight[experts])
        read = jnp.einsum("ri,rik->rk", x[:ROWS], spread[experts])
        added = jnp.einsum("rk,rik->ri", x[:ROWS, :2], spread[experts])
        return live(x, product, x, read, y[:ROWS] + product, y[:ROWS] + added)

    def ours(x, y, weight):
        return live(
            *branch_matmul(x, weight, sizes),
            *branch_columns(x, columns, sizes),
            add_matmul(y, x, weight, sizes),
            add_columns(y, x[:, :2], columns, sizes),
        )

    pairs = (jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, y, weight) for loss in (ours, reference))
    for mine, target in zip(*map(jax.tree.leaves, pairs), strict=True):
        assert largest(target) > 0
        assert_close(mine, target, 1e-5)
