#!/usr/bin/env bash
# Train as a Slurm job: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
#   GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5   size of the job, and how it lies on the machines
#   SRUN_ARGS                                more arguments of srun
#   MASTER_PORT                              port on the first machine; without one 20000 to 29999 by chance
#   PYTHON                                   interpreter; without one that of .venv beside tools/, or python
#   REQUEUE=1                                inside a batch job: put the job back into the queue when it was stopped
#
# A job that Slurm may preempt or that outlives its time limit continues by itself as a batch script of these lines
# (USR1 comes two minutes before the limit; the training saves, leaves WORK_DIR/stopped.json, ends with 75, and the job
# is queued again. The file counts, and not only the status: srun's is the worst of all tasks', one of which may have
# been killed for being late):
#   #!/bin/bash
#   #SBATCH --requeue --open-mode=append --signal=USR1@120 --nodes=1 --ntasks-per-node=8 --gres=gpu:8 --time=04:00:00
#   REQUEUE=1 GPUS=8 tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR --resume
set -euo pipefail
if [[ $# -lt 4 ]]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
if ! command -v srun > /dev/null; then
    echo "error: srun not found: this script runs where Slurm is installed; tools/dist_train.sh needs none" >&2
    exit 2
fi
PARTITION=$1 JOB_NAME=$2 CONFIG=$3 WORK_DIR=$4
GPUS=${GPUS:-8}
check_number GPUS "$GPUS" 1 1000000
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
check_number GPUS_PER_NODE "$GPUS_PER_NODE" 1 1000000
check_number CPUS_PER_TASK "${CPUS_PER_TASK:-5}" 1 1000000
# Chosen here, once, since every task of the job must have the same.
export MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 10000))}
check_number MASTER_PORT "$MASTER_PORT" 1 65535
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# SRUN_ARGS is a list of words.
# shellcheck disable=SC2206
COMMAND=(srun -p "$PARTITION" --job-name="$JOB_NAME" --gres="gpu:$GPUS_PER_NODE" --ntasks="$GPUS"
    --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-}
    "$(pick_python)" -u "$TOOLS/train.py" "$CONFIG" --work-dir "$WORK_DIR" "${@:5}" --launcher slurm)
if [[ -z "${REQUEUE:-}" || -z "${SLURM_JOB_ID:-}" ]]; then
    exec "${COMMAND[@]}"
fi
if ! [[ "$SLURM_JOB_ID" =~ ^[0-9][0-9_+]*$ ]]; then
    echo "error: SLURM_JOB_ID: expected the number of a job, got '$SLURM_JOB_ID'" >&2
    exit 2
fi
# Said by the training itself, as far as it comes: what is there already is of an earlier start.
MARKER=$WORK_DIR/stopped.json
[[ "$MARKER" == /* ]] || MARKER=$PWD/$MARKER
rm -f "$MARKER"
export MILA_MM_STOP_MARKER=$MARKER
# Slurm may signal this shell instead of the training (--signal=B:USR1@120), or as well; srun passes it on. The training has
# its own SIGTERM by then, or takes a second one for nothing. Heard from before the training is there.
asked='' job=''
pass_on() {
    asked=$1
    [[ -n "$job" ]] || return 0
    if [[ "$1" == TERM ]]; then
        (sleep 2 && kill -TERM "$job" 2> /dev/null) &
    else
        kill -USR1 "$job" 2> /dev/null || true
    fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
"${COMMAND[@]}" &
job=$!
[[ -z "$asked" ]] || pass_on "$asked"
wait_for "$job"
# 128 + SIGUSR1: it came before the tasks could hear it
[[ -z "$asked" || "$status" != 138 ]] || status=75
if [[ "$status" == 75 || -e "$MARKER" ]]; then # stopped by a signal, to be continued
    scontrol requeue "$SLURM_JOB_ID"
    status=75
fi
exit "$status"
