"""The benchmarks of ``make gpu-check`` with a GPU's part replaced: what they save, continue, judge and print."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {'gpu': 'some GPU', 'driver': '1', 'torch': '2', 'triton': '3', 'commit': 'c' * 40, 'date': '2026-01-01'}
TIMES = {
    'forward': {'median': 1.0},
    'both': {'median': 3.0},
    'forward_graph': None,
    'both_graph': None,
    'forward_peak_bytes': 2**30,
    'both_peak_bytes': 2**31,
}
NAMES = pytest.mark.parametrize('name', ['attention_op', 'block_fusions', 'backbone'])
Run = Callable[..., int]


@pytest.fixture(autouse=True)
def tf32_as_it_was() -> Iterator[None]:
    """The benchmarks set it for the process."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f'benchmarks.{name}')


@pytest.fixture
def run(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a benchmark on two sizes; ``measured`` receives what it measures and may raise."""

    def run(name: str, measured: Callable[[str], None], *argv: str, commit: str = MACHINE['commit']) -> int:
        module, measure = load(name), load('measure')
        cpu = torch.device('cpu')
        monkeypatch.setattr(measure, 'machine', lambda: MACHINE | {'commit': commit})
        monkeypatch.setattr(measure, 'copy_bandwidth', lambda: 1e12)
        monkeypatch.setattr(measure, 'require_cuda', lambda: None)
        monkeypatch.setattr(module, 'require_kernels', lambda: None, raising=False)
        monkeypatch.setattr(module, 'worst_errors', lambda *_: (0.0, 0.0), raising=False)
        monkeypatch.setattr(module, 'difference', lambda *_: 0.0, raising=False)
        monkeypatch.setattr(
            module, 'models', lambda arch, names, backend: {n: nn.Identity() for n in names}, raising=False
        )
        monkeypatch.setattr(module, 'draw', lambda *_: [torch.zeros(4, device=cpu)] * 2, raising=False)

        def measure_one(*args: Any) -> dict[str, Any]:
            measured(repr(args[-2:]))
            return dict(TIMES)

        monkeypatch.setattr(module, 'measure_one', measure_one)
        one = {
            'attention_op': ['--stages', '1'],
            'block_fusions': ['--stages', '1', '--fusions', 'dwc_silu'],
            'backbone': [],
        }[name]
        monkeypatch.setattr(
            sys,
            'argv',
            [
                name,
                '--sizes',
                '64x64x1',
                '64x96x2',
                '--implementations',
                'ours',
                'eager',
                '--out',
                str(tmp_path / 'out.json'),
                *one,
                *argv,
            ],
        )
        return module.main()

    return run


@NAMES
def test_an_interrupted_run_keeps_its_rows_and_continues(name: str, run: Run, tmp_path: Path) -> None:
    calls: list[str] = []

    def interrupted(case: str) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(case)

    with pytest.raises(KeyboardInterrupt):
        run(name, interrupted)
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert len(rows) == 3 and {row['dtype'] for row in rows} == {'bf16'}, 'bf16 comes first'
    assert rows[0]['both']['median'] == 3.0
    calls.clear()
    assert run(name, calls.append, '--resume') == 0
    after = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert len(calls) == 5 and len(after) == 8 and after[:3] == rows
    cases = {(row['dtype'], row['implementation'], *row['image'], row['batch']) for row in after}
    assert len(cases) == 8, 'each once'
    calls.clear()
    assert run(name, calls.append) == 0
    assert len(calls) == 8, 'without --resume it begins anew'


@NAMES
def test_rows_of_another_commit_are_not_continued(name: str, run: Run, tmp_path: Path) -> None:
    assert run(name, lambda case: None) == 0
    before = (tmp_path / 'out.json').read_text()
    with pytest.raises(SystemExit, match=r'expected commit ddd, got ccc.*leave --resume out'):
        run(name, lambda case: None, '--resume', commit='ddd')
    assert (tmp_path / 'out.json').read_text() == before


@NAMES
def test_fp32_is_fp32(name: str, run: Run) -> None:
    allowed: list[bool] = []
    run(name, lambda case: allowed.append(torch.backends.cudnn.allow_tf32))
    assert allowed == [False] * 8


def test_a_write_that_fails_leaves_the_file(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    out = tmp_path / 'out.json'
    load('measure').write(out, {'rows': [1]})
    with pytest.raises(TypeError):
        load('measure').write(out, {'rows': [1, object()]})
    assert json.loads(out.read_text()) == {'rows': [1]}


def fusion_row(dtype: str, batch: int, implementation: str, milliseconds: float) -> dict[str, Any]:
    return {
        'fusion': 'dwc_silu',
        'dtype': dtype,
        'stage': 'dwc_silu 1',
        'implementation': implementation,
        'image': [224, 224],
        'batch': batch,
        'both': {'median': milliseconds},
        'both_graph': None,
    }


def test_verdicts_pool_neither_dtypes_nor_sizes(load: Callable[[str], ModuleType]) -> None:
    rows = []
    for dtype, batch, ours in (('bf16', 1, 1.0), ('bf16', 8, 4.0), ('fp32', 1, 4.0)):
        rows += [
            fusion_row(dtype, batch, 'ours', ours),
            fusion_row(dtype, batch, 'eager', 9.0),
            fusion_row(dtype, batch, 'compiled', 2.0),
        ]
    lines = load('block_fusions').verdicts(rows)
    said = {line.partition(',')[2].partition(':')[0].strip(): line.partition(': ')[2] for line in lines}
    assert list(said) == [
        'bf16, all sizes',
        'bf16, 224 x 224, batch 1',
        'bf16, 224 x 224, batch 8',
        'fp32, all sizes',
        'fp32, 224 x 224, batch 1',
    ]
    assert said['bf16, 224 x 224, batch 1'].startswith('WINS, 2.00 x')
    assert said['bf16, 224 x 224, batch 8'].startswith('LOSES, 0.50 x')
    assert said['fp32, all sizes'].startswith('LOSES, 0.50 x')
    assert said['bf16, all sizes'].endswith('(worst 0.50, 1 of 2 cases)')


def row(implementation: str, forward: float, both: float, peak: float, **more: Any) -> dict[str, Any]:
    return {
        'dtype': 'bf16',
        'implementation': implementation,
        'image': [800, 1280],
        'correct': True,
        'forward': {'median': forward},
        'both': {'median': both},
        'forward_peak_bytes': 2**30,
        'both_peak_bytes': peak * 2**30,
        **more,
    }


@pytest.fixture
def report(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[dict[str, Any]], str]:
    """Print the report of a document."""

    def report(document: dict[str, Any]) -> str:
        path = tmp_path / 'result.json'
        path.write_text(json.dumps({'machine': MACHINE, **document}))
        monkeypatch.setattr(sys, 'argv', ['report', str(path)])
        assert load('report').main() == 0
        return capsys.readouterr().out

    return report


def test_report_of_a_backbone(report: Callable[[dict[str, Any]], str]) -> None:
    step = {'arch': 'tiny', 'batch': 2}
    rows = [
        row('eager', 20, 50, 4, **step),
        row('compiled', 10, 28, 3, **step),
        row('ours', 8, 20, 1.5, **step),
        row('ours-fused', 6, 25, 1.8, **step),
    ]
    out = report({'benchmark': 'backbone', 'rows': rows})
    assert '| eager ms | compiled ms | ours ms | ours-fused ms |' in out
    assert '| 50.000 | 28.000 | 20.000 | 25.000 | 2.5 x | 1.4 x |  | 4.00, 3.00, 1.50, 1.80 |' in out
    title = 'training step of MILA-T, batch 2,'
    assert [line for line in out.splitlines() if line.startswith('- ')] == [
        f'- met: {title} ours: 2.50 x eager, goal 2.5 x',
        f'- met: {title} ours: 0.38 of the peak memory of eager, goal 0.5',
        f'- met: {title} ours: 1.40 x compiled, goal 1.3 x',
        f'- met: {title} ours: 0.50 of the peak memory of compiled, goal 0.5',
        f'- MISSED: {title} ours-fused: 2.00 x eager, goal 2.5 x',
        f'- met: {title} ours-fused: 0.45 of the peak memory of eager, goal 0.5',
        f'- MISSED: {title} ours-fused: 1.12 x compiled, goal 1.3 x',
        f'- MISSED: {title} ours-fused: 0.60 of the peak memory of compiled, goal 0.5',
    ]


def test_report_of_the_op(report: Callable[[dict[str, Any]], str]) -> None:
    rows = []
    for stage, share in zip((1, 2, 3, 4), (80, 59, 61, 20), strict=True):
        case = {'stage': stage, 'batch': 8}
        rows += [
            row('eager', 8, 14, 4, **case),
            row('ours', 1 + (stage == 4), 2, 1, forward_percent_of_copy=share, both_percent_of_copy=50, **case),
        ]
    out = report({'benchmark': 'attention_op', 'copy_bandwidth': 4e12, 'rows': rows})
    assert [line for line in out.splitlines() if line.startswith('- ')] == [
        '- met: forward of stage 1, batch 8: 80 % of copy bandwidth, goal 60 %',
        '- MISSED: forward + backward of stage 1, batch 8: 50 % of copy bandwidth, goal 60 %',
        '- MISSED: forward of stage 2, batch 8: 59 % of copy bandwidth, goal 60 %',
        '- MISSED: forward + backward of stage 2, batch 8: 50 % of copy bandwidth, goal 60 %',
        '- met: forward of stage 3, batch 8: 61 % of copy bandwidth, goal 60 %',
        '- MISSED: forward + backward of stage 3, batch 8: 50 % of copy bandwidth, goal 60 %',
        '- MISSED: forward of all attentions of MILA-T, batch 8: 6.5 x eager, goal 8 x',
        '- met: forward + backward of all attentions of MILA-T, batch 8: 7.0 x eager, goal 6 x',
    ]
    few = report({'benchmark': 'attention_op', 'copy_bandwidth': 4e12, 'rows': rows[:2]})
    assert [line[:30] for line in few.splitlines() if line.startswith('- ')] == [
        '- met: forward of stage 1, bat',
        '- MISSED: forward + backward o',
    ]


def test_report_beside_other_backbones(report: Callable[[dict[str, Any]], str]) -> None:
    step = {'arch': 'tiny', 'batch': 2}
    rows = [
        row('ours', 4, 12, 3, forward_graph={'median': 2.9}, both_graph={'median': 10.0}, **step),
        row('ours-graphs', 3, 10.5, 3, forward_graph=None, both_graph=None, **step),
        row('convnext-t', 5, 10, 2, forward_graph={'median': 6.3}, both_graph={'median': 9.5}, **step),
    ]
    out = report({'benchmark': 'backbone', 'rows': rows})
    assert [line for line in out.splitlines() if line.startswith('- ')] == [
        '- met: forward of MILA-T, device: 2.90 ms, goal 3.0 ms',
        '- MISSED: forward + backward of MILA-T, device: 10.00 ms, goal 9.0 ms',
        '- met: wall clock of the step of MILA-T: 1.20 x ConvNeXt-T, goal 1.5',
        '- MISSED: peak memory of the step of MILA-T: 1.50 x ConvNeXt-T, goal 1',
        '- met: wall clock of the step from CUDA graphs: 1.05 x its device time, goal 1.1',
    ]


def test_goals_of_detectors_and_fusions(load: Callable[[str], ModuleType]) -> None:
    judge = load('report').goals
    rates = {'MILA-T': 6.5, 'ConvNeXt-T': 6.6, 'Swin-T': 6.3}
    rows = [{'backbone': name, 'images_per_second': rate} for name, rate in rates.items()]
    assert judge({'benchmark': 'detector_step', 'rows': [*rows, {'backbone': 'MILA-T-graphs', 'failure': 'x'}]}) == [
        'MISSED: MILA-T: 6.50 images/s, ConvNeXt-T 6.60',
        'met: MILA-T: 6.50 images/s, Swin-T 6.30',
    ]
    fusions = [
        {**fusion_row('bf16', batch, 'ours', 1.0), 'stage': stage, 'both_percent_of_copy': share}
        for batch, stage, share in ((8, 'cpe_norm 1', 61), (8, 'dwc_silu 3', 59), (8, 'mlp 1', 9), (2, 'cpe_norm 1', 9))
    ]
    assert judge({'benchmark': 'block_fusions', 'rows': [*fusions, {**fusions[0], 'stage': 'cpe_norm 4'}]}) == [
        'met: cpe_norm, stage 1, batch 8: 61 % of copy bandwidth, goal 60 %',
        'MISSED: dwc_silu, stage 3, batch 8: 59 % of copy bandwidth, goal 60 %',
    ]
