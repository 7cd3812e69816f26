"""The cases that lie beside the checkout end as each of them says."""

import importlib.util
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from mila_mm import cli

CASES = Path(__file__).resolve().parents[4] / 'shared' / 'cases'


def shared_cases() -> dict[str, tuple[str, str, Callable[[Path], str]]]:
    """Read the cases that lie beside the checkout, none where there are none."""
    if not (CASES / 'make.py').is_file():
        return {}
    spec = importlib.util.spec_from_file_location('shared_cases', CASES / 'make.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


@pytest.mark.skipif(not shared_cases(), reason=f'no {CASES}')
@pytest.mark.parametrize('name', shared_cases() or [''])
def test_shared_cases(command, workspace, monkeypatch, root, name) -> None:
    situation, right, write = shared_cases()[name]
    monkeypatch.setenv('CASES_PROJECT', str(root))
    words = shlex.split(write(workspace))
    ended = command(words[0].removeprefix('tools/'), *words[1:])
    if situation.startswith('control'):
        assert ended.status == 0, ended.err
        return
    assert ended.status in (0, cli.EXIT_USER_ERROR), ended.err
    if ended.status:
        assert 0 < len(ended.err.strip().splitlines()) <= 3, ended.err
        assert 'Traceback' not in ended.err
    else:
        assert 'WARNING - data:' in ended.out, right
