"""The mark ``forking``: tests of a file that fork ranks, in a fresh process.

A process whose autograd has once had threads (as a backward on meta tensors starts them) cannot fork ranks that
differentiate, and which tests ran before in a process is chance. So pytest is started once more for such a file, and
each test reports what its namesake did there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for jobs_on_ranks.py

FRESH = 'MILA_MM_FRESH_PROCESS'
ROOT = Path(__file__).resolve().parents[3]
# Name of a test to its outcome, what it says and its seconds.
Outcomes = dict[str, tuple[str, str, float]]
_outcomes = pytest.StashKey[dict[Path, Outcomes]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line('markers', 'forking: forks ranks; the file runs in a process of its own')


def run_fresh(session: pytest.Session, path: Path) -> Outcomes:
    """Run the selected tests of a file in a process of its own."""
    selected = [item.nodeid for item in session.items if item.path == path]
    env = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST_')} | {FRESH: '1'}
    with TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={report}', *selected]
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if not report.exists():
            return {'': ('failed', f'no report:\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}', 0.0)}
        cases = list(ElementTree.parse(report).getroot().iter('testcase'))
    result: Outcomes = {}
    for case in cases:
        bad = [child for child in case if child.tag in {'failure', 'error', 'skipped'}]
        text = '\n'.join(child.text or child.get('message', '') for child in bad)
        kind = 'passed' if not bad else 'skipped' if all(child.tag == 'skipped' for child in bad) else 'failed'
        result[case.get('name', '')] = (kind, text, float(case.get('time', 0)))
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Report the outcome of the fresh process in place of running a marked test, fixtures included."""
    if os.environ.get(FRESH) or item.get_closest_marker('forking') is None:
        return None
    files = item.session.stash.setdefault(_outcomes, {})
    if item.path not in files:
        files[item.path] = run_fresh(item.session, item.path)
    missing = files[item.path].get('', ('failed', f'the fresh process did not run {item.name}', 0.0))
    kind, text, seconds = files[item.path].get(item.name, missing)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for when in ('setup', 'call', 'teardown'):
        outcome = kind if when == 'call' else 'passed'
        told = (str(item.path), 0, text) if outcome == 'skipped' else text if outcome == 'failed' else None
        report = pytest.TestReport(
            item.nodeid, item.location, {}, outcome, told, when, duration=seconds if when == 'call' else 0.0
        )
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # what the test before has left standing for this file
    return True
