"""A strict environment: eight CPU devices, no implicit promotion of ranks, and of dtypes in our own code."""

import itertools
import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sborax.fetch import smollm2_gguf

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Hardly optimised programs compile in half the time. In the environment too: subprocesses must compute the same bits.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Forget compiled programs now and then: each holds memory maps, of which Linux grants a process 65,530."""
    yield
    if next(_tests_run) % 100 == 0:
        jax.clear_caches()


@pytest.fixture
def strict():
    """Strict dtype promotion, for tests of our own code alone (optax does not survive it)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def compiled_fully():
    """Programs as users have them, for a module that tests how something is computed, and not only what."""
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Runs of the module that are alike share their compiled programs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("programs")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _local(variable: str, folder: str) -> Path:
    shared = Path(__file__).resolve().parents[2] / "shared" / folder
    return Path(os.environ.get(variable, shared))


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Where real models lie: $SBORAX_MODELS, or a folder beside the checkout."""
    return _local("SBORAX_MODELS", "models")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Where real data sets lie: $SBORAX_DATA, or a folder beside the checkout."""
    return _local("SBORAX_DATA", "data")


@pytest.fixture(scope="session")
def stories260k(models_dir) -> Path:
    """A real LLaMA of 260,032 parameters in Hugging Face layout."""
    place = models_dir / "stories260k"
    if not place.exists():
        pytest.skip("stories260k is not at hand; set SBORAX_MODELS")
    return place


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, fetched once a machine."""
    return smollm2_gguf()
