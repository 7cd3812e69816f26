"""The mark ``interpreted``: a test of Triton kernels that runs in Triton's interpreter, on the CPU.

Triton decides when it decorates a kernel whether to interpret or to compile, so one process does one of the two. Run
normally, pytest is started once more for each file with ``TRITON_INTERPRET=1``, on the marked tests that are selected,
and each of them reports what its namesake did there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import pytest
import torch

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
ROOT = Path(__file__).resolve().parents[2]
Outcomes = dict[tuple[str, str], str | None]
_outcomes = pytest.StashKey[Outcomes]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', "interpreted: runs in Triton's interpreter, in a process of its own")


def run_interpreting(session: pytest.Session, path: Path) -> Outcomes:
    """Module and name of each marked test of a file to None for a pass, else to its report."""
    selected = [item.nodeid for item in session.items if item.path == path and item.get_closest_marker('interpreted')]
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}']
        run = subprocess.run([*command, *selected], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if not report.exists():
            pytest.fail(f'the interpreting process wrote no report:\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}')
        cases = list(ElementTree.parse(report).getroot().iter('testcase'))
    result: Outcomes = {}
    for case in cases:
        bad = [child for child in case if child.tag in {'failure', 'error', 'skipped'}]
        reports = [child.text or child.get('message', '') for child in bad]
        key = case.get('classname', '').rpartition('.')[2], case.get('name', '')
        result[key] = '\n'.join(reports) if bad else None
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Report the outcome of the interpreting process in place of running a marked test."""
    if INTERPRETED or pyfuncitem.get_closest_marker('interpreted') is None:
        return None
    outcomes = pyfuncitem.session.stash.setdefault(_outcomes, {})
    key = pyfuncitem.path.stem, pyfuncitem.name
    if all(module != key[0] for module, _ in outcomes):
        outcomes |= run_interpreting(pyfuncitem.session, pyfuncitem.path)
    if key not in outcomes:
        pytest.fail(f'the interpreting process did not run {key[1]}', pytrace=False)
    if (report := outcomes[key]) is not None:
        pytest.fail(f'in the interpreting process:\n{report}', pytrace=False)
    return True


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that an element which no kernel writes fails its test."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
