#!/usr/bin/env bash
# Run the commands of docs/quickstart.md unchanged, in order, in a fresh clone of this checkout's last commit.
# Prints every command and its time, and stops at the first that fails. The clone is removed at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

clone=$(mktemp -d)
trap 'rm -rf "$clone"' EXIT
git clone --quiet . "$clone/sborax"
cd "$clone/sborax"
# The page must work without the caller's environment.
unset PYTHONPATH SBORAX_DATA SBORAX_MODELS
commands=$(awk '/^```bash$/ {on = 1; next} /^```/ {on = 0} on' docs/quickstart.md)
[ -n "$commands" ] || { echo "error: docs/quickstart.md has no commands" >&2; exit 2; }

began=$SECONDS
while IFS= read -r command <&3; do
  printf '\n$ %s\n' "$command"
  started=$SECONDS
  # In this shell, so that `source` lasts, as for a reader. A failure ends the script.
  eval "$command" 3<&-
  echo "  ($((SECONDS - started)) s)"
done 3<<<"$commands"
printf '\nevery command of docs/quickstart.md ended well, in %s s\n' "$((SECONDS - began))"
