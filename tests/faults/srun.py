"""A stand-in for Slurm's ``srun`` on one machine: several tasks, signals passed on, and --kill-on-bad-exit.

As srun does, it ends with the worst status of its tasks, 128 + the signal for one that was killed. ``FAULTS_MISSING``
is the number of a task that never starts, as on a node that does not come up.
"""

import os
import signal
import subprocess
import sys
import time

REACTION = 0.3  # seconds until the tasks of other nodes are killed after one has ended with a bad status


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
    ranks = [rank for rank in range(count) if str(rank) != missing]
    tasks = [
        subprocess.Popen(argv, env={**common, 'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank)}) for rank in ranks
    ]

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
