"""What a step costs, as compiled: FLOPs, temporary memory and compilations may not grow unnoticed. Never time."""

import dataclasses
import functools
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from nightly import nightly_unless

from benchmarks import checks, gpu
from benchmarks.checks import failures
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
    sizes = [compiled(name).memory_analysis().temp_size_in_bytes for name in (method, "LoRA")]
    assert sizes[0] < sizes[1]


def test_the_least_possible_is_that_of_the_shape():
    shape = SHAPES["SmolLM2-135M"]
    base = 30 * sum(i * o for i, o in kernels(shape)) + 576 * 49152
    assert base == 134_515_008 - 61 * 576, "all of SmolLM2-135M but its norms"
    assert minimum_flops(shape, 1, 1, 0) == 4 * base + 30 * 12 * 576
    assert minimum_flops(shape, 1, 1, 7) - minimum_flops(shape, 1, 1, 0) == 6 * 7


@pytest.mark.nightly
def test_a_second_step_compiles_nothing():
    prepared = workload(TINY)
    state, constants = prepared.state, (prepared.parts.frozen, prepared.parts.base, prepared.batch)
    for _ in range(2):
        state, _ = prepared.step(state, *constants)
    assert prepared.step._cache_size() == 1


def test_bytes_between_devices_are_counted_by_the_turns_of_loops():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, copies = (jax.sharding.PartitionSpec(*names) for names in (("x",), ()))

    def program(x, w):
        gathered = jax.lax.all_gather(w, "x", tiled=True)
        return jax.lax.fori_loop(0, 3, lambda _, y: jax.lax.psum(y @ gathered, "x") / 8, x)

    mapped = jax.jit(jax.shard_map(program, mesh=mesh, in_specs=(copies, rows), out_specs=copies, check_vma=False))
    text = mapped.lower(jnp.ones((4, 16)), jnp.ones((16, 16))).compile().as_text()
    assert collective_bytes(text) == {"all-gather": 16 * 16 * 4, "all-reduce": 3 * 4 * 16 * 4}


def test_checks_over_their_limit_are_told():
    results = {"a": [("near", 1e-6, 1e-5), ("far", 1e-4, 1e-5), ("not a number", math.nan, 1.0)], "b": "ValueError: no"}
    assert failures(results) == ["a, far: 0.0001 > 1e-05", "a, not a number: nan > 1", "b: ValueError: no"]


@pytest.mark.nightly
def test_methods_step_the_same_on_the_cpu_as_on_the_cpu():
    """The program of the checks, where the device is the reference itself."""
    results = checks.results(["donation", "SBoRA"])
    assert not failures(results) and len(results["SBoRA"]) == 3


@pytest.mark.nightly
def test_the_gpus_command_from_end_to_end(tmp_path):
    """With a tiny shape in place of all: every part is measured once, and a second run measures nothing."""
    out = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--steps", "2", "--workers", "2", "--out", str(out)]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    assert [json.loads(line)["part"] for line in out.read_text().splitlines()] == list(gpu.parts())
    assert "not measured" not in first.stdout and first.stdout.count(": measured") == len(gpu.parts())
    assert "measured" not in second.stdout and "subjects, 0 failed" in second.stdout
    assert second.stdout.count("\n| ") == first.stdout.count("\n| ")
