#!/usr/bin/env bash
# Runs one process for each GPU of a SLURM job. The command line gives nodes, tasks and GPUs:
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 scripts/launch_slurm.sh EXPERIMENT --out /shared/RUN
# A pre-empted job saves a checkpoint, is queued again and resumes.
#SBATCH --job-name=sborax
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: sbatch [OPTIONS] scripts/launch_slurm.sh EXPERIMENT [--out RUN] [key=value ...]" >&2; exit 2; }
# sbatch runs a copy of this file: the checkout is where the job was submitted.
cd "${SLURM_SUBMIT_DIR:-.}"
sborax=.venv/bin/sborax
[ -x "$sborax" ] || sborax=sborax
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || set -- "$@" --resume
# A dead task ends the others, so that nothing waits for it.
exec srun --kill-on-bad-exit=1 "$sborax" train "$@" --distributed
