"""What the replication concludes from its runs."""

import math
from pathlib import Path

import pytest
import yaml

from mila_mm.errors import UserError
from mila_mm.study.model import STUDY_ROWS
from mila_mm.study.replication import Row, noise, rank_correlation, summarise, verdict
from mila_mm.study.replication_report import PUBLISHED, check_rows, markdown

ROOT = Path(__file__).resolve().parents[2]
MACHINE = dict(device='a CPU', torch='2', mmengine='1', mmseg='1', mila_mm='0', date='2026-01-02')
DATA = dict(num_train=8, num_val=4, size=64, seed=0)


def result(row, miou, seed=0):
    return dict(
        row=row,
        seed=seed,
        metrics=dict(mIoU=miou),
        params=1_500_000,
        seconds=60.0,
        iterations=600,
        batch_size=16,
        data=DATA,
        machine=MACHINE,
    )


def row(name, *values, published=None):
    return Row(name, values, 1, 1.0, published)


def test_every_row_of_the_study_has_its_published_figure_or_none():
    assert list(PUBLISHED) == list(STUDY_ROWS)
    tables = yaml.safe_load((ROOT / 'benchmarks' / 'published.yml').read_text())
    printed = {name: row['top1'] for table in ('designs', 'encodings') for name, row in tables[table]['rows'].items()}
    assert {name: value for name, value in PUBLISHED.items() if value is not None} == printed


def test_runs_are_grouped_by_row_in_the_order_of_the_paper():
    runs = [result('lepe', 60, 1), result('baseline', 50), result('lepe', 58, 0)]
    rows = summarise(runs, PUBLISHED)
    assert [(r.name, r.values, r.mean, r.published) for r in rows] == [
        ('baseline', (50,), 50, 77.6),
        ('lepe', (58, 60), 59, 81.6),
    ]


def test_noise_is_two_standard_errors_of_a_difference():
    rows = [row('a', 10, 12), row('b', 20, 20), row('c', 5, 7)]
    variance = (2 + 0 + 2) / 3  # pooled, with one degree of freedom for each row
    assert noise(rows) == pytest.approx(2 * math.sqrt(2 * variance / 2))
    assert noise([row('a', 10), row('b', 20)]) is None
    # a row with one seed adds no freedom but makes differences less sure
    assert noise([*rows, row('d', 1)]) > noise(rows)


@pytest.mark.parametrize(
    ('ours', 'theirs', 'margin', 'expected'),
    [
        (55, 78, 1.0, 'as in the paper'),
        (45, 72, 1.0, 'as in the paper'),
        (45, 78, 1.0, 'the other way'),
        (50.5, 78, 1.0, 'within the noise'),
        (50.5, 78, None, 'as in the paper'),
        (55, None, 1.0, ''),
    ],
)
def test_verdict(ours, theirs, margin, expected):
    baseline = row('baseline', 50, published=77.6)
    assert verdict(row('x', ours, published=theirs), baseline, margin) == expected
    assert verdict(baseline, baseline, margin) == ''


def test_rank_correlation():
    def rows(*pairs):
        return [row(str(i), a, published=b) for i, (a, b) in enumerate(pairs)]

    assert rank_correlation(rows((1, 70), (5, 71), (6, 90))) == pytest.approx(1)
    assert rank_correlation(rows((1, 90), (5, 71), (6, 70))) == pytest.approx(-1)
    assert rank_correlation(rows((1, 70), (2, 70), (3, 80), (4, 80))) == pytest.approx(2 / math.sqrt(5))
    assert rank_correlation([*rows((1, 70), (5, 71), (6, 90)), row('no figure', 100)]) == pytest.approx(1)


def test_the_page_says_what_agrees_and_what_does_not():
    runs = [
        result(name, miou + step, seed)
        for name, miou in (
            ('baseline', 50),
            ('no_normalization', 30),
            ('forget_gate', 40),
            ('shortcut', 50.01),
            ('lepe_cpe_rope', 70),
        )
        for seed, step in ((0, -0.5), (1, 0.5))
    ]
    page = markdown(runs)
    assert '| no_normalization | 1.50 M | 29.50 30.50 | 30.00 | -20.00 | 72.4 | -5.2 | as in the paper |' in page
    assert '| lepe_cpe_rope | 1.50 M | 69.50 70.50 | 70.00 | +20.00 |  |  |  |' in page
    assert 'direction of the paper: 1 of 3 (no_normalization)' in page
    assert 'Moved the other way: 1 (forget_gate)' in page and 'Cannot be told from the baseline: 1 (shortcut)' in page
    assert '600 steps of 16 images' in page and '8 training images' in page and '2026-01-02' in page


def test_the_page_needs_the_baseline():
    with pytest.raises(UserError, match='baseline'):
        markdown([result('lepe', 60)])
    assert 'One seed' in markdown([result('baseline', 50)])


def test_rows_by_name():
    assert check_rows(['lepe', 'baseline'], STUDY_ROWS) == ['baseline', 'lepe']
    assert check_rows(None, STUDY_ROWS) == list(STUDY_ROWS)
    with pytest.raises(UserError, match=r"'lpe'.*baseline, input_gate"):
        check_rows(['lpe'], STUDY_ROWS)
