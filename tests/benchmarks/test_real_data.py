"""benchmarks/real_data: on ten images of each set where they are, and what its plan and its report do with rows."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.real_data import report  # noqa: E402
from benchmarks.real_data.backbones import NAMES  # noqa: E402
from benchmarks.real_data.results import Results, best_rate, claimed  # noqa: E402
from benchmarks.real_data.tasks import KEY, LONG, RATES, SHORT, TASKS, planned  # noqa: E402
from benchmarks.real_data.training import loss_at_end, part_of  # noqa: E402


def done(row, **values):
    """A row as a run leaves it."""
    machine = {'cpu': 'a CPU', 'threads': 1, 'torch': '2', 'date': '2026-01-01T00:00', 'load': 1.0}
    fixed = dict(macs=10**9, params=10**6, images=4 * row['steps'], diverged=False, data_digest=row['seed'], curve=[])
    fixed |= dict(step_cpu_s=0.1, step_wall_s=0.1, peak_bytes=2**20, cpu_seconds=60.0, machine=machine, final=None)
    return {**row, 'lr': row['lr'] or RATES[1], 'loss_at_end': 1.0, **fixed, **values}


@pytest.fixture
def rows():
    """All rows of the narrow plan; the middle rate is the best, MILA is ahead of ResNet and behind ConvNeXt."""
    figures = {'MILA': 0.5, 'ResNet': 0.4, 'Swin': 0.51, 'ConvNeXt': 0.6}
    made = []
    for row in planned('narrow'):
        if row['schedule'] == 'try':
            made.append(done(row, loss_at_end=2.0 + abs(math.log(row['lr'] / RATES[1]))))
            continue
        task = TASKS['narrow'][row['set']]
        value = figures[row['backbone']] + 0.01 * row['seed']
        final = {task.metric: value if task.detects else 100 * value, 'IoU.sky': 90.0, 'share.sky': 20.0}
        final |= {'IoU.pole': None, 'share.pole': 1.0}
        made.append(done(row, final=final))
    return made


def test_the_plan_does_first_what_is_worth_most():
    plan = list(planned('narrow'))
    names = [(row['set'], row['backbone'], row['schedule'], row['seed']) for row in plan]
    assert len({tuple(row.values()) for row in plan}) == len(plan)
    for name in TASKS['narrow']:
        first = names.index((name, 'MILA', SHORT, 0))
        assert {n[1] for n in names[:first] if n[0] == name and n[2] == 'try'} == set(NAMES)
    order = [row['schedule'] + str(row['seed']) for row in plan]
    assert order.index('long0') > max(i for i, each in enumerate(order) if each == 'short0')
    assert order.index('short1') > max(i for i, each in enumerate(order) if each == 'long0')
    assert {n[1] for n in names if n[2] == LONG} == {'MILA'}, 'peers have no long schedule to be compared in'
    assert next(planned('narrow', scale=0.5))['steps'] == plan[0]['steps'] // 2


def test_the_rate_is_the_best_of_all_that_were_tried(rows):
    row = next(row for row in planned('narrow') if row['schedule'] == SHORT)
    tries = [each for each in rows if each['schedule'] == 'try']
    assert best_rate(tries, row) == RATES[1]
    assert best_rate([each for each in tries if each['lr'] != RATES[2]], row) is None, 'one is missing'
    tries = copy.deepcopy(tries)
    for each in tries:
        if each['lr'] == RATES[1]:
            each['loss_at_end'] = None
    assert best_rate(tries, row) in (RATES[0], RATES[2]), 'a rate that diverged is none'
    assert loss_at_end([3.0, 2.0, 1.0, 5.0], 4) == 5.0
    assert loss_at_end([3.0, 2.0, float('nan')], 3) is None
    assert loss_at_end([3.0, 2.0], 4) is None


def test_results_are_kept_row_by_row_and_taken_once(rows, tmp_path):
    results = Results(tmp_path / 'sub' / 'r.json')
    assert not results.has(rows[0])
    results.add(rows[0])
    results.add(rows[1])
    assert Results(results.path).has(rows[1]) and not results.has({**rows[0], 'seed': 9})
    with claimed(tmp_path / 'run') as mine, claimed(tmp_path / 'run') as also:
        assert mine and not also
    with claimed(tmp_path / 'run') as again:
        assert again


def test_the_report_says_ahead_level_behind_and_not_run(rows):
    text = report.tables(rows, 'narrow')
    line = next(line for line in text.splitlines() if line.startswith('- nuclei, AP50'))
    assert 'ahead of ResNet' in line and 'level with Swin' in line and 'behind ConvNeXt' in line
    assert '0.510 (0.500 to 0.520)' in text, 'the mean of three seeds'
    assert '| pole | 1.0 | none |' in text, 'a class without a figure'
    assert 'cannot be compared' not in text
    some = [row for row in rows if row['backbone'] != 'Swin' and row['schedule'] != LONG]
    some[-1]['data_digest'] = 77
    text = report.tables(some, 'narrow')
    assert '| Swin, 32 wide, 2-2-2-2 | not run |' in text
    assert '| camvid | not run | | mIoU not run | 45.0 |' in text
    assert 'cannot be compared' in text
    assert 'Not run' in report.tables([], 'narrow')


def test_a_part_of_annotations_keeps_those_of_its_images(tmp_path):
    whole = {'images': [{'id': i} for i in range(9)], 'annotations': [{'image_id': i % 9} for i in range(30)]}
    (tmp_path / 'all.json').write_text(json.dumps(whole))
    part = json.loads(
        Path(part_of(tmp_path / 'all.json', slice(None, None, 4), tmp_path / 'new/part.json')).read_text()
    )
    assert [image['id'] for image in part['images']] == [0, 4, 8]
    assert sorted(each['image_id'] for each in part['annotations']) == [0] * 4 + [4] * 3 + [8] * 3


@pytest.mark.parametrize('backbones', [['MILA'], pytest.param(list(NAMES), marks=pytest.mark.slow)], ids=len)
def test_quick_runs_everything(sample_data, tmp_path, backbones):
    command = [sys.executable, '-m', 'benchmarks.real_data', '--quick', '--work-dir', str(tmp_path)]
    command += ['--backbones', *backbones, '--data', str(sample_data)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = json.loads((tmp_path / 'quick.json').read_text())['rows']
    runs = {(row['set'], row['backbone']): row for row in rows if row['schedule'] == SHORT}
    assert set(runs) == {(name, backbone) for name in TASKS['narrow'] for backbone in backbones}
    for (name, _), row in runs.items():
        assert abs(row['macs'] / runs[name, 'MILA']['macs'] - 1) <= 0.1
        assert row['data_digest'] == runs[name, 'MILA']['data_digest'], 'other images than MILA saw'
        assert TASKS['narrow'][name].metric in row['final'] and len(row['curve']) == 1
        assert row['peak_bytes'] > 0 and row['step_cpu_s'] > 0 and math.isfinite(row['loss_at_end'])
        assert row['command'].endswith(str(sample_data)) and row['config']['backbone']['type']
        assert {'cpu', 'torch', 'commit', 'date', 'versions'} <= row['machine'].keys()
        assert set(KEY) <= row.keys()
    assert runs['bccd', 'MILA']['config']['backbone']['out_indices'] == [1, 2, 3], 'as the swap chose'
    assert sum(key.startswith('IoU.') for key in runs['camvid', 'MILA']['final']) == 11
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert 'seed 0' not in again.stdout, 'what is done is not done again'
