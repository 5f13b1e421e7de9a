"""Sums on a CPU are right, whatever way sborax is imported, and come out alike from call to call."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from sums import error_of_sums, errors_of_gradients

import sborax as sx
from sborax.layout import xla_flags
from sborax.layout.xla_flags import FLAG, RIGHT_SUMS, SWITCH

TESTS = Path(__file__).resolve().parent
ROUNDING = 2e-5
OTHER = "--xla_cpu_enable_fast_math=false"
KNOWN_WRONG = xla_flags.JAXLIB == "0.10.2" and platform.machine() == "x86_64"

pytestmark = pytest.mark.usefixtures("compiled_fully")


def report(statement: str, *words: str) -> dict:
    """What a process of its own says of sums after a statement that imports sborax."""
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "PYTHONPATH": str(TESTS.parent)}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": OTHER}
    command = [sys.executable, TESTS / "sums.py", statement, *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("statement", ["import sborax.cli", "import jax, sborax"])
def test_sums_are_right_where_sborax_is_imported_first(statement):
    answer = report(statement)
    assert answer["flags"] == f"{OTHER} {RIGHT_SUMS}"
    assert answer["error"] < ROUNDING
    assert answer["warnings"] == []


def test_a_process_that_has_computed_is_warned_in_one_line():
    answer = report("import jax; jax.devices(); import sborax; import sborax.cli", "gradients")
    (warning,) = answer["warnings"]
    assert f"import sborax first or set XLA_FLAGS={RIGHT_SUMS}" in warning and "\n" not in warning
    assert answer["flags"] == OTHER
    if KNOWN_WRONG:
        assert answer["error"] > 0.1 and min(answer["gradients"]) > 0.1


@pytest.mark.parametrize("started", [False, True], ids=["before use", "after use"])
@pytest.mark.parametrize(
    ("flags", "switch"),
    [(OTHER, "0"), (f"{FLAG}=dot {OTHER}", "1"), (f"{OTHER} {RIGHT_SUMS}", "1")],
    ids=["switched off", "a value of the user's", "inherited"],
)
@pytest.mark.quick
def test_flags_are_left_alone(flags, switch, started, monkeypatch):
    monkeypatch.setattr(xla_flags, "has_computed", lambda: started)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv(SWITCH, switch)
    xla_flags.guard()  # a warning would be an error
    assert os.environ["XLA_FLAGS"] == flags


def test_flags_in_a_file_stay(tmp_path, monkeypatch):
    file = tmp_path / "flags"
    file.write_text(f"{OTHER}\n")
    monkeypatch.setattr(xla_flags, "has_computed", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", str(file))
    xla_flags.guard()
    assert os.environ["XLA_FLAGS"] == f"{OTHER} {RIGHT_SUMS}"


@pytest.mark.parametrize(
    ("version", "affected"),
    [("0.10.1", False), ("0.10.2", True), ("0.10.2.dev20260601", True), ("0.11.2", True), ("0.12.0", False)],
)
def test_versions_that_need_the_flag(version, affected):
    assert xla_flags.affected(version) == affected


def test_a_jaxlib_that_needs_no_flag_is_right_without_it():
    """Fails for a version that is wrong and that nobody has said so of."""
    assert xla_flags.affected(xla_flags.JAXLIB) or error_of_sums() < ROUNDING


def test_a_jaxlib_without_the_flag_does_not_get_it(tmp_path, monkeypatch):
    """It would end the process."""
    (tmp_path / "__init__.py").touch()
    library = tmp_path / "libjax_common.so"
    monkeypatch.setattr(jaxlib, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(xla_flags, "JAXLIB", "0.10.2")
    monkeypatch.setattr(xla_flags, "has_computed", lambda: False)
    for content, flags in ((b"xla_cpu_multi_thread_eigen", OTHER), (FLAG[2:].encode(), f"{OTHER} {RIGHT_SUMS}")):
        library.write_bytes(content)
        monkeypatch.setenv("XLA_FLAGS", OTHER)
        xla_flags.guard()
        assert os.environ["XLA_FLAGS"] == flags


@pytest.mark.parametrize(
    "method",
    [sx.LoRA(rank=2), sx.SBoRA(rank=2), sx.Bone(rank=1), sx.DoRA(rank=2)],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.quick
def test_gradients_are_those_of_float64(method):
    """At a size where they are wrong by 0.3 and more without the flag."""
    assert max(errors_of_gradients(method)) < ROUNDING


def test_a_step_called_again_has_the_same_bits():
    """Eight devices of one process: XLA computes with as many threads at least."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2048, 128), (128, 128)))
    rules = [("up", sx.LoRA(rank=8)), ("down", sx.DoRA(rank=8))]
    params, adapters = sx.attach(jax.random.key(0), {name: {"kernel": weight} for name in ("up", "down")}, rules)
    train, frozen = sx.split(adapters)

    @jax.jit
    def gradients(train, x):
        def loss(train):
            up, down = (sx.combine(train, frozen)[name]["kernel"] for name in ("up", "down"))
            hidden = x / jnp.sqrt(jnp.mean(x**2, axis=1, keepdims=True))
            hidden = jax.nn.silu(sx.linear(hidden, params["up"]["kernel"], up))
            logits = sx.linear(hidden, params["down"]["kernel"], down)
            return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])

        return jax.value_and_grad(loss)(train)

    def bits():
        return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(gradients(train, x)))

    assert len({bits() for _ in range(20)}) == 1
