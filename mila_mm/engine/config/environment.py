"""What a launcher says in environment variables: checked one by one before it is a number, a port or an address."""

import math
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from mila_mm.errors import UserError, printable
from mila_mm.marker import MARKER_VARIABLE, MOST_VARIABLE
from mila_mm.stopping import GRACE_VARIABLE

# By launcher: what torch calls rank, number of processes and number on the machine.
_TORCH = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')
_NAMES = {
    'pytorch': _TORCH,
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}
_NEEDED = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
    'mpi': (*_NAMES['mpi'], 'MASTER_ADDR'),
}
_SCRIPTS = {'pytorch': 'tools/dist_train.sh or tools/dist_test.sh', 'slurm': 'tools/slurm_train.sh'}
_MOST = 10**6  # processes; no job has more
_PORT = 29500  # torch's
_ADDRESS = re.compile(r'(?!-)[\w.:%\[\]-]{1,255}', re.ASCII)
_NODES = re.compile(r'(?!-)[\w.,\[\]-]{1,65536}', re.ASCII)
# Slurm has called it both; the first is that of the step.
_NODE_LISTS = ('SLURM_STEP_NODELIST', 'SLURM_NODELIST')


def check_environment() -> None:
    """Check the variables that steer how a training stops, with any launcher.

    Raises:
        UserError: For the first that is none of what it should be.
    """
    _check_if_set(GRACE_VARIABLE, _is_seconds, 'a number of seconds from 0 on')
    _check_if_set(MOST_VARIABLE, lambda word: _number(word, 1, 10**9 - 1), 'a whole number from 1 on')
    marker = os.environ.get(MARKER_VARIABLE)
    if marker and (not marker.isprintable() or not Path(marker).is_absolute() or Path(marker).is_dir()):
        raise _refused(MARKER_VARIABLE, 'the path of a file, from / on')


def check_launcher(launcher: str) -> None:
    """Check that the process was started by the launcher that the flag names, and what that says.

    Args:
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UserError: For a variable that is not set, or is none of what it should be.
    """
    if launcher not in _NEEDED:
        return
    missing = [name for name in _NEEDED[launcher] if name not in os.environ]
    if missing:
        raise UserError(
            f'--launcher {launcher}: {", ".join(missing)} not set in the environment\n'
            f'Start the job through {_SCRIPTS.get(launcher, "mpirun, with MASTER_ADDR exported")}.'
        )
    rank, size, local_rank = _NAMES[launcher]
    count = _needed_number(size, 1, _MOST)
    _needed_number(rank, 0, count - 1, f'{size}={count}')
    local_count = os.environ.get('LOCAL_WORLD_SIZE')
    if local_count is not None:
        _needed_number('LOCAL_WORLD_SIZE', 1, count, f'{size}={count}')
    if local_rank in os.environ:
        # --launcher of another kind leaves LOCAL_WORLD_SIZE as it finds it
        most = int(local_count) if local_count is not None and launcher == 'pytorch' else count
        _needed_number(local_rank, 0, most - 1, f'{most} processes there')
    _check_if_set('MASTER_PORT', lambda word: _number(word, 1, 65535), 'a port, 1 to 65535')
    _check_if_set('MASTER_ADDR', _ADDRESS.fullmatch, 'the name or the address of a machine')
    for name in _NODE_LISTS if launcher == 'slurm' else ():
        _check_if_set(name, _NODES.fullmatch, 'names of machines as Slurm writes them, node[1-4]')
    interfaces = {name for _, name in socket.if_nameindex()}
    named = os.environ.get('GLOO_SOCKET_IFNAME', '')
    if set(filter(None, named.split(','))) - interfaces:
        raise _refused('GLOO_SOCKET_IFNAME', f'a network interface of this machine, {", ".join(sorted(interfaces))}')


def name_ranks(launcher: str) -> None:
    """Give what a launcher says torch's names, and a port and an address where it says none.

    Args:
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UserError: As :func:`check_launcher`, and if Slurm cannot be asked for the first machine of a job.
    """
    check_launcher(launcher)
    if launcher == 'none':
        return
    for name, source in zip(_TORCH, _NAMES[launcher], strict=True):
        if source in os.environ:
            os.environ[name] = os.environ[source]
    # All tasks of a Slurm job agree on the port that tools/slurm_train.sh exports
    os.environ.setdefault('MASTER_PORT', str(_PORT))
    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_host(os.environ)


def rank_of(launcher: str) -> int:
    """Return the number of this process in its job, 0 without a launcher."""
    rank = os.environ.get(_NAMES.get(launcher, _TORCH)[0], '')
    return int(rank) if launcher != 'none' and _number(rank, 0, _MOST) else 0


def _first_host(env: Mapping[str, str]) -> str:
    """Host of rank 0: the first one of a Slurm job, else this machine."""
    nodes = next((env[name] for name in _NODE_LISTS if env.get(name)), None)
    if nodes is None:
        return '127.0.0.1'
    if shutil.which('scontrol') is None:
        if ',' in nodes or '[' in nodes:
            raise UserError(
                f'--launcher slurm: no scontrol to ask for the first machine of {printable(nodes)}\n'
                'Export MASTER_ADDR, the address of that machine.'
            )
        return nodes if env.get('SLURM_NNODES', '1') != '1' else '127.0.0.1'
    command = ['scontrol', 'show', 'hostnames', nodes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    names = done.stdout.split()
    if done.returncode or not names or not _ADDRESS.fullmatch(names[0]):
        raise UserError(
            f'--launcher slurm: scontrol does not tell the first machine of {printable(nodes)}: '
            f'{printable(done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}")}\n'
            'Export MASTER_ADDR, the address of that machine.'
        )
    return names[0]


def _needed_number(name: str, least: int, most: int, why: str = '') -> int:
    if not _number(os.environ[name], least, most):
        raise _refused(name, f'a whole number from {least} to {most}{f" ({why})" if why else ""}')
    return int(os.environ[name])


def _check_if_set(name: str, fits: Callable[[str], object], expected: str) -> None:
    if name in os.environ and not fits(os.environ[name]):
        raise _refused(name, expected)


def _refused(name: str, expected: str) -> UserError:
    return UserError(
        f'environment variable {name}: expected {expected}, got {printable(os.environ[name])!r}\n'
        f'Set it so, or unset it where nothing needs it.'
    )


def _number(word: str, least: int, most: int) -> bool:
    return word.isascii() and word.isdecimal() and len(word) < 12 and least <= int(word) <= most


def _is_seconds(word: str) -> bool:
    try:
        return math.isfinite(float(word)) and float(word) >= 0 and '_' not in word
    except ValueError:
        return False
