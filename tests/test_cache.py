"""The user's cache directory, and what the command line imports before it has work to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sborax.cli.cache import LARGEST, SHORTEST, cache_dir, keep_programs

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty cache directory, and no variable that says where programs are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    return tmp_path


def run(code: str) -> str:
    """What a new Python process prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_jax_keeps_programs_in_the_cache_directory(home):
    keep = "from sborax.cli.cache import keep_programs; keep_programs(); import jax; config = jax.config"
    options = ("cache_dir", "cache_max_size")
    printed = run(f"{keep}; print(*(getattr(config, 'jax_compilation_' + name) for name in {options}))")
    directory, size = printed.split()
    assert Path(directory).parent == cache_dir() / "programs" == home / "sborax" / "programs"
    assert Path(directory).is_dir() and int(size) == LARGEST


def test_programs_that_take_a_tenth_of_a_second_are_kept(home, monkeypatch):
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    keep = "from sborax.cli.cache import keep_programs; keep_programs(); import jax"
    assert float(run(f"{keep}; print(jax.config.jax_persistent_cache_min_compile_time_secs)")) == SHORTEST
    program = f"{keep}\ndef f(x):\n  y = x\n  for _ in range(60): y = jax.numpy.sin(y @ x)\n  return y\n"
    run(f"{program}jax.jit(f)(jax.numpy.eye(4))")
    assert list((home / "sborax" / "programs").rglob("jit_f-*"))


def test_a_directory_of_the_user_stays(home, monkeypatch):
    monkeypatch.setenv(VARIABLE, "elsewhere")
    keep_programs()
    assert os.environ[VARIABLE] == "elsewhere" and not list(home.iterdir())


def test_without_a_place_to_write_nothing_is_kept(home, monkeypatch):
    (home / "sborax").write_text("a file where the directory would be")
    keep_programs()
    assert VARIABLE not in os.environ


@pytest.mark.quick
def test_the_command_line_imports_jax_when_there_is_work():
    modules = "print(*sorted({'jax', 'numpy', 'flax', 'transformers', 'sborax.public'} & set(sys.modules)))"
    assert run(f"import sys, sborax; from sborax.cli.main import make_parser; make_parser(); {modules}").split() == []
    assert run(f"import sys, sborax as sx; sx.LoRA; {modules}").split() == ["jax", "numpy", "sborax.public"]


@pytest.mark.quick
def test_a_plan_imports_no_reader_of_data_or_tokenizers():
    modules = "print(*sorted({'datasets', 'grain', 'pandas', 'transformers'} & set(sys.modules)))"
    assert run(f"import sys, sborax.cli.plan; {modules}").split() == []
