#!/usr/bin/env bash
# Set up .venv-test, fetch the real model, and run every check: ruff, pyright, pytest. Arguments go to pytest.
# With --quick as the first argument pyright checks the package alone and pytest runs the tests marked `quick`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

quick=
if [[ "${1:-}" == --quick ]]; then
  quick=yes
  shift
fi

make_venv .venv-test
if ! installed .venv-test; then
  echo "installing sborax and its test tools into .venv-test"
  # torch first, by itself: builds without CUDA, where they exist, are gigabytes smaller.
  install .venv-test torch==2.13.0 || fail "torch could not be installed; see above"
  install .venv-test --editable '.[test]' || fail "the packages could not be installed; see above"
  mark_installed .venv-test
fi
bin=.venv-test/bin
$bin/python -c 'from sborax.cli.fetch import smollm2_gguf; smollm2_gguf()'

# Two workers on two cores: each computes with one thread, and compiled programs are shared within the run.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export JAX_COMPILATION_CACHE_DIR=$cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
# XLA:CPU's older emitters compile in two thirds of the time. A jaxlib without the flag would exit at once.
emitters="${XLA_FLAGS:-} --xla_cpu_use_fusion_emitters=false"
if XLA_FLAGS=$emitters $bin/python -c 'import jax; jax.devices()' 2>/dev/null; then export XLA_FLAGS=$emitters; fi
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
# Where Python may not keep compiled modules, each of the many processes compiles JAX and its like again.
unset PYTHONDONTWRITEBYTECODE

$bin/ruff check
$bin/ruff format --check
if [[ $quick ]]; then
  $bin/pyright --pythonpath $bin/python sborax
  # Only the files that have such tests: importing the others would take as long as running these.
  $bin/pytest -n 2 -m quick $(grep -l 'mark\.quick' tests/test_*.py) "$@"
else
  $bin/pyright --pythonpath $bin/python
  # All tests of a file run in one worker, so that shared fixtures are made once. By default the files with the fewest
  # tests come last: some of these take minutes, while the other worker idles.
  $bin/pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
fi
