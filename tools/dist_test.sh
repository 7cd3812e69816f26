#!/usr/bin/env bash
# Test on several GPUs of one machine or more: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# NNODES, NODE_RANK, MASTER_ADDR, PORT as explained in tools/_launch.sh.
set -euo pipefail
if [[ $# -lt 3 ]]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of tools/test.py]" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch "$TOOLS/test.py" "$3" "$1" "$2" "${@:4}"
