"""benchmarks/high_resolution: exponents, what is left out, and a run on images of no meaning."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import high_resolution, high_resolution_report


def rows_of(exponent: float, name: str = 'MILA-T', noise: float = 0.0) -> list[dict]:
    """Rows that grow with an exponent, up and down by a factor in turn."""
    sides = (512, 1024, 2048, 3072, 4096)
    return [
        dict(stage='forward', implementation=name, image=[side, side],
             seconds=1e-12 * side ** (2 * exponent) * (1 + noise * (-1) ** i), peak_bytes=2**30)
        for i, side in enumerate(sides)
    ]  # fmt: skip


def test_the_exponent_is_in_pixels_and_has_an_interval():
    exact = high_resolution_report.fitted([(row['image'][0], row['seconds']) for row in rows_of(1.3)])
    assert exact == pytest.approx((1.3, 0.0), abs=1e-6)
    value, half = high_resolution_report.fitted([(r['image'][0], r['seconds']) for r in rows_of(1.0, noise=0.2)])
    assert value - half < 1.0 < value + half and half > 0.05
    assert high_resolution_report.fitted([(1024, 1.0), (2048, 4.0)]) == (pytest.approx(1.0), math.inf)


def test_what_would_take_too_long_or_too_much_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(high_resolution, 'free_bytes', lambda: 8 * 2**30)
    rows = rows_of(2.0, 'ViT-S')[:3]  # 17.6 s at 2048
    row = dict(stage='forward', implementation='ViT-S', image=[4096, 4096])
    assert high_resolution.expected_seconds(row, rows) == pytest.approx(rows[-1]['seconds'] * 16)
    assert 'more than 180 s' in high_resolution.reason_to_leave_out(row, rows, 180.0)
    assert high_resolution.reason_to_leave_out(row, rows, 300.0) is None
    step, memory = {**row, 'stage': 'step'}, {**row, 'stage': 'memory'}
    much, little = ([{**memory, 'computed_bytes': size * 2**30}] for size in (5, 3))
    assert 'more than 60% of what is free' in high_resolution.reason_to_leave_out(step, much, 180.0)
    assert high_resolution.reason_to_leave_out(step, little, 180.0) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason='tests what it says on a CPU')
def test_a_run_is_continued_and_printed(tmp_path, capsys):
    out = tmp_path / 'result.json'
    argv = ['--models', 'MILA-T', '--sides', '64', '--out', str(out)]
    assert high_resolution.main([*argv, '--what', 'memory']) == 0
    row = json.loads(out.read_text())['rows'][0]
    assert row['computed_bytes'] > 8 * 24_000_000 and row['machine']['date'], 'parameters and gradients at least'
    assert high_resolution.main([*argv, '--what', 'memory', 'step']) == 0
    rows = json.loads(out.read_text())['rows']
    assert rows[0] == row and [each['stage'] for each in rows] == ['memory', 'step']
    assert rows[1]['seconds'] > 0
    assert '| MILA-T | not run | not run | not run |' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        high_resolution.main(['--sides', '100'])
