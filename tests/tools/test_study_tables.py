"""tools/analysis_tools/study_tables.py: what it prints, writes and refuses."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from PIL import Image

from mila_mm.errors import UserError
from mila_mm.study.published import read_published
from mila_mm.study.report import check_order
from mila_mm.study.throughput import relative_throughput


@pytest.fixture(scope='module')
def tool(root):
    spec = importlib.util.spec_from_file_location('study_tables', root / 'tools' / 'analysis_tools' / 'study_tables.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RATIOS = dict(
    baseline=1.0,
    input_gate=0.97,
    forget_gate=0.5,
    shortcut=0.99,
    no_normalization=1.1,
    single_head=1.3,
    block_all=0.8,
    block_substitute=0.9,
    ape=0.98,
    lepe=0.91,
    cpe=0.89,
    rope=1.09,
)


@pytest.fixture
def timings(tmp_path):
    rows = {row: dict(ratio=r, ratio_q1=r - 0.01, ratio_q3=r + 0.01, images_per_s=10 * r) for row, r in RATIOS.items()}
    path = tmp_path / 'timings.json'
    path.write_text(json.dumps(dict(machine='a machine', torch='2', date='today', batch=1, rounds=3, rows=rows)))
    return path


def test_writes_tables_and_plots(tool, root, tmp_path, timings, capsys):
    page = tmp_path / 'study.md'
    text = (root / 'docs' / 'study.md').read_text()
    page.write_text(text)
    tool.main(['--doc', str(page), '--results', str(timings), '--images', str(tmp_path / 'images')])
    written, printed = page.read_text(), capsys.readouterr().out
    assert '| + forget gate | 28.68 M | 29 M | 4.82 G | 4.8 G | 0.50 (0.49 to 0.51) | 0.64 | 78.4 |' in written
    assert '| APE | 29.70 M | 30 M | 4.46 G | 4.5 G | 0.98 (0.97 to 0.99) | 0.98 | 80.0 |' in written
    assert '| **MILA-T** | 44 M | 255 G | 46.8 | 69.5 | 51.5 | 42.1 | 66.4 | 45.0 | 48.8 | 71.0 |' in written
    assert '| **MILA-B** | 128 M | 1183 G | 51.9 | 52.5 |' in written
    assert 'CPE is within 10 % of the baseline: **does not hold here** (0.89)' in written
    generated = re.compile(r'(<!-- begin (\w+) \(generated\) -->)\n(.*?)\n?(<!-- end \2 -->)', re.DOTALL)
    parts = {name: content for _, name, content, _ in generated.findall(written)}
    assert set(parts) == {'designs', 'encodings', 'order', 'mask_rcnn', 'upernet'}
    assert all(content and content in printed for content in parts.values())
    assert generated.sub(r'\1\4', written) == generated.sub(r'\1\4', text), 'nothing else changes'
    again = written
    for name, content in parts.items():
        again = tool.replace_part(again, name, content, page)
    assert again == written
    for name in ('study_accuracy_cost.png', 'study_accuracy_latency.png'):
        with Image.open(tmp_path / 'images' / name) as image:
            assert min(image.size) > 600 and len(image.convert('RGB').getcolors(2**24)) > 50


def test_the_committed_page_is_what_the_tool_writes(root):
    page = (root / 'docs' / 'study.md').read_text()
    timings = json.loads((root / 'benchmarks' / 'results' / 'study_throughput.json').read_text())
    assert timings['machine'] in page
    for line in check_order(timings['rows']):
        assert line in page
    for row in ('forget_gate', 'single_head', 'rope'):
        assert f'{timings["rows"][row]["ratio"]:.2f} (' in page


def test_mistakes_are_named(tool, root, tmp_path, timings):
    page = tmp_path / 'page.md'
    with pytest.raises(UserError, match='expected timings, found none; add --measure'):
        tool.main(['--results', str(tmp_path / 'none.json')])
    with pytest.raises(UserError, match='expected a page to write into, found none'):
        tool.main(['--results', str(timings), '--doc', str(page)])
    with pytest.raises(UserError, match=r'expected the marks <!-- begin designs \(generated\) -->'):
        tool.replace_part('no marks', 'designs', '', page)
    copy = tmp_path / 'published.yml'
    shutil.copy(root / 'benchmarks' / 'published.yml', copy)
    copy.write_text(copy.read_text().replace('source: localmamba', 'source: hearsay', 1))
    with pytest.raises(UserError, match='expected every source under sources, not found: hearsay'):
        read_published(copy)
    copy.write_text(copy.read_text().replace('[MILA-T, 1.2]', '[MILA-T]').replace('hearsay', 'localmamba'))
    with pytest.raises(UserError, match='expected 2 figures in a row'):
        read_published(copy)


def test_published_figures_are_consistent(root):
    published = read_published(root / 'benchmarks' / 'published.yml')
    models = {row['model'] for row in published.tables['classification'].rows}
    assert {row['model'] for row in published.tables['latency'].rows} <= models, 'each latency has its accuracy'
    for row in published.tables['mask_rcnn'].rows:
        assert row['one'] or row['three']
        for figures in filter(None, (row['one'], row['three'])):
            box, box50, box75, mask, mask50, mask75 = figures
            assert box > mask and (box50 is None or (box50 > box75 > box and mask50 > mask75 > mask))


def test_throughput_is_relative_to_the_first():
    class Sleeper(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(size, size))

        def forward(self, x):
            return torch.linalg.matrix_power(self.weight, 40)

    result = relative_throughput({'small': Sleeper(300), 'large': Sleeper(900)}, torch.rand(2, 3, 4, 4), rounds=5)
    assert result['small']['ratio'] == 1.0 and result['large']['ratio'] < 0.5
    assert result['large']['ratio_q1'] <= result['large']['ratio'] <= result['large']['ratio_q3']
