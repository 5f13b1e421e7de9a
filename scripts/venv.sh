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

# uv_for DIR: the command uv, put into DIR if there is none. It installs in a tenth of pip's time.
uv_for() {
  command -v uv && return
  if [[ ! -x "$1/bin/uv" ]]; then
    "$1/bin/python" -m pip install -qq --disable-pip-version-check --no-input uv >/dev/null 2>&1 || return 1
  fi
  echo "$1/bin/uv"
}

# install DIR ARGUMENTS...: with uv, or where that fails with pip, which also reads its own settings.
# Neither compiles what it installs: Python does so for the modules that are imported.
install() {
  local venv=$1 uv
  shift
  if uv=$(uv_for "$venv") &&
    UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}} "$uv" pip install --quiet --python "$venv/bin/python" "$@"; then
    return
  fi
  "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check --no-input "$@"
}

# installed DIR: whether DIR was filled for the present pyproject.toml, as `mark_installed` recorded
installed() {
  cmp --silent pyproject.toml "$1/installed.toml"
}

mark_installed() {
  cp pyproject.toml "$1/installed.toml"
}
