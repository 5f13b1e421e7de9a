# Sourced by the other scripts: makes and fills a virtual environment in this checkout.

fail() {
  echo "error: $*" >&2
  exit 2
}

# The first Python 3.11 or later. Each candidate is run, since a command may exist and not work.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# make_venv DIR
make_venv() {
  if "$1/bin/python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  local python
  python=$(find_python) || fail "no Python 3.11 or later on PATH; install one, or set PYTHON to it"
  echo "making $1 with $("$python" --version)"
  "$python" -m venv --clear "$1" >/dev/null ||
    fail "$python cannot make a virtual environment; install its venv module (Debian: python3-venv)"
}

# install DIR ARGUMENTS...: with uv, which is faster, if it is installed, or else with pip
# Neither compiles what it installs: Python does so for the modules that are imported.
install() {
  local venv=$1
  shift
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$venv/bin/python" "$@"
  else
    "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check --no-input "$@"
  fi
}

# installed DIR: whether DIR was filled for the present pyproject.toml, as `mark_installed` recorded
installed() {
  cmp --silent pyproject.toml "$1/installed.toml"
}

mark_installed() {
  cp pyproject.toml "$1/installed.toml"
}
