#!/usr/bin/env bash
# Run sborax on every host of a Cloud TPU slice, from a machine where gcloud is logged in.
#   scripts/launch_tpu_pod.sh NAME ZONE install                  puts this commit and its packages on every host
#   scripts/launch_tpu_pod.sh NAME ZONE train EXPERIMENT --out gs://BUCKET/RUN [--resume]
# Environment variables of the hosts, such as HF_TOKEN, go into SBORAX_ENV="HF_TOKEN=... OTHER=...".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -ge 3 ] || { sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
name=$1 zone=$2
shift 2

everywhere() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

if [ "$1" = install ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  archive=$folder/sborax.tar.gz
  git archive --format=tar.gz --output="$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$name:sborax.tar.gz" --zone="$zone" --worker=all
  everywhere "mkdir -p sborax && tar -xzf sborax.tar.gz -C sborax && python3 -m venv sborax/.venv &&
    sborax/.venv/bin/pip install --quiet 'jax[tpu]>=0.10.2,<0.12' ./sborax"
  exit
fi
command=$(printf '%q ' "$@")
everywhere "cd sborax && env ${SBORAX_ENV:-} .venv/bin/sborax ${command}--distributed"
