#!/usr/bin/env bash
# Train on several GPUs of one machine or more: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# NNODES, NODE_RANK, MASTER_ADDR, PORT as explained in tools/_launch.sh.
set -euo pipefail
if [[ $# -lt 2 ]]; then
    echo "usage: $0 CONFIG GPUS [arguments of tools/train.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch "$TOOLS/train.py" "$2" "$1" "${@:3}"
