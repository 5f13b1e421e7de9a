"""A strict environment: eight CPU devices, no implicit promotion of ranks, and of dtypes in our own code."""

import itertools
import os
from pathlib import Path

import jax
import pytest
from at_hand import STORIES, folder
from jax.experimental.compilation_cache import compilation_cache

from sborax.cli.fetch import smollm2_gguf

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Hardly optimised programs compile in half the time. In the environment too: subprocesses must compute the same bits.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Forget compiled programs now and then: each holds memory maps, of which Linux grants a process 65,530.

    A test of a generation leaves a thousand of them. Beyond the limit, XLA ends in a segmentation fault.
    """
    yield
    count = next(_tests_run)
    if count % 100 == 0 or (count % 10 == 0 and memory_maps() > 30_000):
        jax.clear_caches()


def memory_maps() -> int:
    """The memory maps of this process; 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return len(maps.read_bytes().splitlines()) if maps.exists() else 0


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
    settings = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("programs")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, settings, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session", params=[None, *STORIES], ids=lambda place: place.name if place else "random")
def llama(request, tmp_path_factory) -> Path:
    """A LLaMA in Hugging Face layout with a tokenizer: a random one, and a real one where it is at hand."""
    # torch takes seconds to import, and few tests need it.
    from sborax_models import write_letters

    return request.param or write_letters(tmp_path_factory.mktemp("llama") / "letters")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Where real data sets may lie: $SBORAX_DATA, or a folder beside the checkout."""
    return folder("SBORAX_DATA", "data")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, fetched once a machine."""
    return smollm2_gguf()
