"""The benchmarks of docs/scale.md at sizes of no meaning: that they run, and what their tables say without a GPU."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='tests what they say on a CPU')


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of benchmarks/ and call its main."""

    def run(name: str, *argv: object):
        monkeypatch.syspath_prepend(str(ROOT))
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, argv)])
        module = importlib.import_module(f'benchmarks.{name}')
        assert module.main() == 0
        return module

    return run


def test_memory(benchmark, tmp_path, capsys):
    out = tmp_path / 'memory.json'
    benchmark('memory', '--archs', 'nano', '--sizes', '64x96x1', '--checkpointing', 'none', '--out', out)
    rows = json.loads(out.read_text())['rows']
    peak = {(row['checkpointing'], row['attention']): row['computed']['peak_bytes'] for row in rows}
    assert len(peak) == 2 and peak['none', 'fused'] < peak['none', 'eager']
    assert all(row['measured'] is None for row in rows)
    text = capsys.readouterr().out
    assert 'no GPU: nothing measured' in text and text.count('| not run | not run |') == 1
    docs = tmp_path / 'scale.md'
    docs.write_text('before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n')
    importlib.import_module('benchmarks.measure').write_docs('| new |', 'x', docs)
    assert docs.read_text() == 'before\n<!-- x -->\n| new |\n<!-- end of x -->\nafter\n'


def test_detector_step(benchmark, tmp_path, capsys):
    out = tmp_path / 'step.json'
    names = ['MILA-T', 'ConvNeXt-T']
    options = ['--backbones', *names, '--runs', 1, '--warmup', 0, '--narrow', '--batch', 1]
    benchmark('detector_step', *options, '--image', 64, 96, '--out', out)
    document = json.loads(out.read_text())
    assert [row['backbone'] for row in document['rows']] == names
    assert all(row['images_per_second'] > 0 for row in document['rows'])
    assert {'cpu', 'torch', 'date', 'commit'} <= document['machine'].keys()
    assert 'not measured' in capsys.readouterr().out, 'no memory of a GPU'
