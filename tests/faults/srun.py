"""A stand-in for Slurm's ``srun`` on one machine: several tasks, signals passed on, and --kill-on-bad-exit.

As srun does, it ends with the worst status of its tasks, 128 + the signal for one that was killed. ``FAULTS_MISSING``
is the number of a task that never starts, as on a node that does not come up. With ``FAULTS_FORK`` the tasks are forks
of this process, once it has imported what takes most of a start's time.
"""

import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

REACTION = 0.3  # seconds until the tasks of other nodes are killed after one has ended with a bad status


IMPORTED = ('mila_mm.engine', 'mmseg.datasets', 'mmseg.models')


class Fork:
    """A task in a fork of this process, with as much of :class:`subprocess.Popen` as is used here."""

    def __init__(self, argv: Sequence[str], env: dict[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os.environ.update(env)
            sys.argv = list(argv)
            runpy.run_path(argv[0], run_name='__main__')
            sys.exit()

    def poll(self) -> int | None:
        """Return how it ended, None while it has not."""
        if self.returncode is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self.wait()
        return self.returncode

    def wait(self) -> None:
        """Wait for its end."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send_signal(self, signum: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, signum)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Run ``srun OPTION... COMMAND...``."""
    options: dict[str, str] = {}
    while argv and argv[0].startswith('-'):
        name, _, value = argv.pop(0).partition('=')
        if name == '-p':
            argv.pop(0)
        options[name] = value
    count = int(options['--ntasks'])
    missing = os.environ.get('FAULTS_MISSING', '')
    common = {**os.environ, 'SLURM_NTASKS': str(count), 'SLURM_NODELIST': 'here'}
    envs = [
        {**common, 'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank)}
        for rank in range(count)
        if str(rank) != missing
    ]
    if os.environ.get('FAULTS_FORK'):
        for name in IMPORTED:
            importlib.import_module(name)
        tasks = [Fork(argv[2:], env) for env in envs]  # python -u SCRIPT ...
    else:
        tasks = [subprocess.Popen(argv, env=env) for env in envs]

    def forward(signum: int, _: object) -> None:
        for task in tasks:
            if task.poll() is None:
                task.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, forward)
    while any(task.poll() is None for task in tasks):
        if options.get('--kill-on-bad-exit') == '1' and any(task.poll() for task in tasks):
            time.sleep(REACTION)
            for task in tasks:
                if task.poll() is None:
                    task.kill()
                    task.wait()
        time.sleep(0.02)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
