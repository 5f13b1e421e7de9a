"""What a step costs, as compiled: FLOPs, temporary memory and compilations may not grow unnoticed. Never time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from nightly import nightly_unless

from benchmarks.ours import Case, unrolled, workload
from benchmarks.shapes import SHAPES, kernels, minimum_flops
from sborax.plans.hlo import collective_bytes

pytestmark = pytest.mark.usefixtures("compiled_fully")

TINY = Case(shape="tiny", batch=2, length=64, rank=4, layers=2)


@functools.cache
def compiled(method):
    return unrolled(dataclasses.replace(TINY, method=method), 2)


@pytest.mark.parametrize("method", nightly_unless([], ["LoRA", "SBoRA-FA", "Bone"]))
def test_flops_stay_near_the_least_possible(method):
    """Below 1 where the first layer needs no gradient of its input, which the bound counts."""
    trained = workload(dataclasses.replace(TINY, method=method)).parts.count
    ratio = compiled(method).cost_analysis()["flops"] / minimum_flops(TINY.sizes, TINY.batch, TINY.length, trained)
    assert 0.95 < ratio < 1.02


@pytest.mark.parametrize("method", nightly_unless([], ["SBoRA-FA", "Bone"]))
def test_no_frozen_projection_keeps_its_input(method):
    held = [compiled(name).memory_analysis().temp_size_in_bytes for name in (method, "LoRA")]
    assert held[0] < held[1]


def test_the_least_possible_is_that_of_the_shape():
    shape = SHAPES["SmolLM2-135M"]
    base = 30 * sum(i * o for i, o in kernels(shape)) + 576 * 49152
    assert base == 134_515_008 - 61 * 576, "all of SmolLM2-135M but its norms"
    assert minimum_flops(shape, 1, 1, 0) == 4 * base + 30 * 12 * 576
    assert minimum_flops(shape, 1, 1, 7) - minimum_flops(shape, 1, 1, 0) == 6 * 7


def test_a_second_step_compiles_nothing():
    prepared = workload(TINY)
    state, constants = prepared.state, (prepared.parts.frozen, prepared.parts.base, prepared.batch)
    for _ in range(2):
        state, _ = prepared.step(state, *constants)
    assert prepared.step._cache_size() == 1


def test_bytes_between_devices_are_counted_by_the_turns_of_loops():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (jax.sharding.PartitionSpec(*names) for names in (("x",), ()))

    def program(x, w):
        gathered = jax.lax.all_gather(w, "x", tiled=True)
        return jax.lax.fori_loop(0, 3, lambda _, y: jax.lax.psum(y @ gathered, "x") / 8, x)

    mapped = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=(whole, rows), out_specs=whole, check_vma=False))
    text = mapped.lower(jnp.ones((4, 16)), jnp.ones((16, 16))).compile().as_text()
    assert collective_bytes(text) == {"all-gather": 16 * 16 * 4, "all-reduce": 3 * 4 * 16 * 4}
