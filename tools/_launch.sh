# Sourced by dist_train.sh and dist_test.sh: start a script once per GPU with torchrun (through _torchrun.py, which
# passes signals on and ends with the exit status of the script).
#
# launch SCRIPT GPUS ARGUMENT...   from the variables
#   NNODES=1 NODE_RANK=0           number of machines, and which one this is; both are needed on several
#   MASTER_ADDR                    address of machine 0; needed on several
#   PORT                           port on machine 0; without one a free port on one machine, 29500 on several
#   PYTHON                         interpreter; without one that of .venv beside tools/, or python

TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$TOOLS")

pick_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        echo "$PYTHON"
    elif [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" && -x "$ROOT/.venv/bin/python" ]]; then
        echo "$ROOT/.venv/bin/python"
    else
        echo python
    fi
}

# check_number NAME VALUE LEAST MOST
check_number() {
    if ! [[ "$2" =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
        echo "error: $1: expected a whole number from $3 to $4, got '$2'" >&2
        exit 2
    fi
}

# wait_for PID: wait for the end of a child through signals, and set $status
wait_for() {
    status=0
    wait "$1" || status=$?
    while kill -0 "$1" 2> /dev/null; do # a signal has ended the waiting alone
        status=0
        wait "$1" || status=$?
    done
}

launch() {
    local script=$1 gpus=$2
    shift 2
    check_number GPUS "$gpus" 1 1000000
    local nnodes=${NNODES:-1} rendezvous
    check_number NNODES "$nnodes" 1 1000000
    if [[ "$nnodes" != 1 && (-z "${MASTER_ADDR:-}" || -z "${NODE_RANK:-}") ]]; then
        echo "error: NNODES=$nnodes: expected MASTER_ADDR (the address of machine 0) and NODE_RANK (0 to" \
            "$((nnodes - 1))) as well, got MASTER_ADDR='${MASTER_ADDR:-}' NODE_RANK='${NODE_RANK:-}'" >&2
        exit 2
    fi
    check_number NODE_RANK "${NODE_RANK:-0}" 0 $((nnodes - 1))
    [[ -z "${PORT:-}" ]] || check_number PORT "$PORT" 1 65535
    if [[ "$nnodes" == 1 && -z "${PORT:-}" ]]; then
        # Port 0: torchrun takes a free one, so two jobs on one machine do not meet.
        rendezvous=(--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:0 --local-addr=127.0.0.1)
    else
        rendezvous=(--node-rank="${NODE_RANK:-0}" --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}")
    fi
    # One thread per process unless told otherwise: torchrun and mmengine do the same, each with a warning.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    exec "$(pick_python)" "$TOOLS/_torchrun.py" --nnodes="$nnodes" --nproc-per-node="$gpus" \
        "${rendezvous[@]}" "$script" "$@" --launcher pytorch
}
