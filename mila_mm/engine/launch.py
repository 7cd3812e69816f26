"""Distributed start on machines without a GPU, which mmengine does not do."""

import os
import shutil
import subprocess
from datetime import timedelta

import torch
from mmengine.config import Config
from mmengine.dist import is_distributed
from torch import distributed

from mila_mm.engine.config.checks import check_launcher
from mila_mm.errors import UserError

_RANK_VARIABLES = {
    'slurm': {'RANK': 'SLURM_PROCID', 'WORLD_SIZE': 'SLURM_NTASKS', 'LOCAL_RANK': 'SLURM_LOCALID'},
    'mpi': {
        'RANK': 'OMPI_COMM_WORLD_RANK',
        'WORLD_SIZE': 'OMPI_COMM_WORLD_SIZE',
        'LOCAL_RANK': 'OMPI_COMM_WORLD_LOCAL_RANK',
    },
}


def prepare_launch(cfg: Config, launcher: str) -> None:
    """Set the launcher of a config and, on a CPU, join the processes over gloo.

    mmengine's own start calls ``torch.cuda.set_device`` whatever the backend; with a process group
    that is there already it leaves it alone.

    Args:
        cfg: Config to change.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UserError: If the launcher's environment variables are not set, or the timeout is no time.
    """
    check_launcher(launcher)
    cfg.launcher = launcher
    if launcher == 'none' or torch.cuda.is_available() or is_distributed():
        return
    for name, source in _RANK_VARIABLES.get(launcher, {}).items():
        if source in os.environ:
            os.environ[name] = os.environ[source]
    # All tasks of a Slurm job agree on the port that tools/slurm_train.sh exports
    os.environ.setdefault('MASTER_PORT', '29500')
    os.environ.setdefault('MASTER_ADDR', _first_host())
    seconds = ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout')
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
        raise UserError(f'env_cfg.dist_cfg.timeout: expected a number of seconds above 0, got {seconds!r}')
    distributed.init_process_group('gloo', timeout=None if seconds is None else timedelta(seconds=seconds))


def _first_host() -> str:
    """Host of rank 0: the first one of a Slurm job, else this machine."""
    nodes = os.environ.get('SLURM_STEP_NODELIST') or os.environ.get('SLURM_NODELIST')
    if nodes is None or shutil.which('scontrol') is None:
        return '127.0.0.1'
    command = ['scontrol', 'show', 'hostnames', nodes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
