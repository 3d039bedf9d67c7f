#!/bin/bash
#SBATCH --job-name=wan22
#SBATCH --array=0-7
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=wan22-%A_%a.log
#
# A batch on as many GPUs as the array has tasks:
#
#   sbatch --array=0-31 scripts/slurm_array.sh prompts.txt [OPTIONS OF wan22 batch …]
#
# Each task makes its part (wan22 reads SLURM_ARRAY_TASK_ID and _COUNT). Two minutes before its time is over, or where it
# is preempted, a task keeps its state and asks to be queued again; it goes on where it was.
set -u

if [ $# -eq 0 ]; then
    echo "usage: sbatch [--array=0-31] $0 FILE [OPTIONS OF wan22 batch …]" >&2
    exit 2
fi

read -r -a command <<<"${WAN22:-wan22}"
"${command[@]}" batch "$@" &
child=$!
asked=
trap 'asked=1; kill -TERM "$child" 2>/dev/null' TERM INT

code=0
wait "$child" || code=$?
if [ -n "$asked" ]; then
    # The first wait ended with the signal, not with the child, which is keeping its state.
    code=0
    wait "$child" || code=$?
    if [ "$code" -ne 0 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    fi
fi
exit "$code"
