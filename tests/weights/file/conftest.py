"""How a bad file must end, whoever reads it."""

import builtins
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.runner.checkpoint import CheckpointLoader

from mila_mm import cli
from mila_mm.weights import register_loaders
from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file.reader import read_file

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def canary(tmp_path):
    return tmp_path / 'MILA_TEST_CANARY'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('weights_tool', ROOT / 'tools' / 'weights.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def keep_loaders(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy())


def watched_import():
    """Fail when the file makes anyone import what it names."""
    real = builtins.__import__

    def watch(name, *args, **kwargs):
        assert name != 'antigravity', 'a checkpoint imported a module'
        return real(name, *args, **kwargs)

    return watch


@pytest.fixture
def refused(tmp_path, canary, tool, capsys, monkeypatch) -> Callable[..., None]:
    """Write a bad file with ``write(path, canary)`` and check that it is refused with some words, and runs nothing."""

    def check(write, words):
        path = tmp_path / 'bad.pth'
        write(path, canary)
        monkeypatch.setattr('builtins.__import__', watched_import())
        with pytest.raises(CheckpointError) as caught:
            read_file(path)
        message = str(caught.value)
        assert str(path) in message
        assert words in message
        assert len(message) < 900
        register_loaders()
        with pytest.raises(CheckpointError):  # the way that mmengine reads
            CheckpointLoader.load_checkpoint(str(path), map_location='cpu', logger=None)
        capsys.readouterr()
        for command in (['inspect', str(path)], ['export', str(path), str(tmp_path / 'out.pth')]):
            assert cli.execute(tool.main, command) == 2
            error = capsys.readouterr().err
            assert str(path) in error
            assert 'Traceback' not in error
        assert not (tmp_path / 'out.pth').exists()
        assert not canary.exists()

    return check
