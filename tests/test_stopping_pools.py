"""Processes of a pool end when the pool ends them, while signals are requests to stop."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

PROGRAM = """
    from multiprocessing import get_context

    from mila_mm.stopping import stop_signals

    with stop_signals():
        for _ in range(4):
            pool = get_context('fork').Pool(4)  # as mmdet's evaluation of VOC makes one
            pool.map(abs, range(4))
            pool.terminate()
            pool.join()
    print('ended')
"""


def test_a_pool_ends_its_processes(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, '-c', dedent(PROGRAM)], cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == 'ended\n' and not done.stderr
