#!/usr/bin/env bash
# Rebuilds docs/RESULTS.md from the stored results of the studies. PYTHON: the interpreter to use.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m experiments.studies report
