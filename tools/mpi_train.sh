#!/usr/bin/env bash
# Train under Open MPI: tools/mpi_train.sh CONFIG PROCESSES [arguments of tools/train.py]
#   MPIRUN_ARGS      more arguments of mpirun: --hostfile, --bind-to, -x
#   MASTER_ADDR      address of the machine of rank 0; without one this machine's
#   MASTER_PORT      port there; without one 20000 to 29999 by chance
#   PYTHON           interpreter; without one that of .venv beside tools/, or python
#
# mpirun answers SIGTERM by killing its processes within a second, and ends with 1. What it does pass on, to all machines,
# is SIGUSR1. So this script hears the scheduler, passes on SIGUSR1, and ends with the status of the training: 75 where
# it was stopped and waits to be continued by --resume.
set -euo pipefail
if [[ $# -lt 2 ]]; then
    echo "usage: $0 CONFIG PROCESSES [arguments of tools/train.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
if ! command -v mpirun > /dev/null; then
    echo "error: mpirun not found: this script runs where Open MPI is installed; tools/dist_train.sh needs none" >&2
    exit 2
fi
CONFIG=$1 COUNT=$2
check_number PROCESSES "$COUNT" 1 1000000
export MASTER_ADDR=${MASTER_ADDR:-$([[ -n "${MPIRUN_ARGS:-}" ]] && hostname || echo 127.0.0.1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 10000))}
check_number MASTER_PORT "$MASTER_PORT" 1 65535
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
# SIGUSR1 stands for SIGTERM here, after which schedulers leave less time.
export MILA_MM_STOP_GRACE=${MILA_MM_STOP_GRACE:-25}
FORWARDED=()
for name in MASTER_ADDR MASTER_PORT PYTHONPATH OMP_NUM_THREADS MKL_NUM_THREADS MILA_MM_STOP_GRACE; do
    FORWARDED+=(-x "$name")
done
for name in MILA_MM_STOP_MARKER MILA_MM_MAX_STOPS; do
    [[ -z "${!name:-}" ]] || FORWARDED+=(-x "$name")
done
asked='' job=''
hear() {
    asked=${asked:-$1}
    [[ -z "$job" ]] || kill -USR1 "$job" 2> /dev/null || true
}
# From before the training is there.
trap 'hear TERM' TERM
trap 'hear USR1' USR1
trap 'hear INT' INT
# In a session of its own: a signal to the group would reach mpirun as well. Some programs ignore it, and its children with it.
# MPIRUN_ARGS is a list of words.
# shellcheck disable=SC2086
setsid mpirun -n "$COUNT" ${MPIRUN_ARGS:-} "${FORWARDED[@]}" \
    "$(pick_python)" -u "$TOOLS/train.py" "$CONFIG" "${@:3}" --launcher mpi &
job=$!
[[ -z "$asked" ]] || hear "$asked"
wait_for "$job"
# 128 + SIGUSR1: it came before the processes could hear it
if [[ -n "$asked" && ("$status" == 75 || "$status" == 138) ]]; then
    [[ "$status" == 75 ]] || echo "stopped by SIG$asked before the training began" >&2
    [[ "$asked" == INT ]] && status=130 || status=75
fi
exit "$status"
