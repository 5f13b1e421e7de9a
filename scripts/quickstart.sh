#!/usr/bin/env bash
# Set up .venv, fetch SmolLM2-135M and a small set of conversations, fine-tune with SBoRA, and show what changed.
# Arguments go to `sborax quickstart`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

make_venv .venv
if ! installed .venv; then
  echo "installing sborax into .venv"
  install .venv --editable . || fail "the packages could not be installed; see above"
  mark_installed .venv
fi
exec .venv/bin/sborax quickstart "$@"
