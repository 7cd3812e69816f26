"""The sweep over a library's configs, and the page that is made from it."""

import json

import pytest

from mila_mm.errors import UserError
from mila_mm.swap.sweep.docs import MARK, write_page
from mila_mm.swap.sweep.sweep import Record, all_configs, representatives, sweep, to_json

NAMES = [
    'mmdet::_base_/default_runtime.py',
    'mmdet::atss/atss_r50_fpn_1x_coco.py',
    'mmdet::atss/atss_r101_fpn_1x_coco.py',
    'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py',
    'mmseg::psanet/psanet_r50-d8_4xb2-80k_cityscapes-512x1024.py',
]


@pytest.fixture(scope='module')
def records():
    return list(sweep(NAMES, 'nano'))


def test_every_config_has_an_outcome_with_a_reason(records) -> None:
    outcome = {r.config: r for r in records}
    assert sorted(outcome) == sorted(NAMES)
    assert [outcome[name].status for name in NAMES] == ['refused', 'swapped', 'swapped', 'refused', 'swapped']
    assert 'fragment' in outcome[NAMES[0]].reason and 'decoder' in outcome[NAMES[3]].reason
    assert outcome[NAMES[1]].family == 'mmdet/atss'


def test_one_representative_for_each_family_that_was_swapped(records) -> None:
    assert representatives(records) == {'mmdet/atss': NAMES[2], 'mmseg/psanet': NAMES[4]}


def test_page_says_what_the_results_say(records, tmp_path) -> None:
    steps = [
        dict(config=NAMES[1], ok=True, seconds=1.0, step={}),
        dict(config=NAMES[4], ok=False, seconds=1.0, reason='a | b <c>'),
    ]
    failed = [Record('mmdet::x/y.py', 'failed', 'no idea')]
    about = dict(arch='nano', date='2026-01-01', machine='m', versions='v')
    results = json.loads(to_json([*records, *failed], steps, about))
    page = tmp_path / 'swap_results.md'
    page.write_text(f'{MARK}\nlast year\n')
    write_page(page, results)
    text = page.read_text()
    assert text.startswith(f'{MARK}\n\n# ') and text.endswith('|\n') and 'last year' not in text
    assert 'swapped or refused: 83.3%' in text and '1 did (50.0%)' in text
    assert '| `mmdet/atss` | 2 |  |  | yes |' in text and 'a \\| b &lt;c>' in text and 'no idea' in text
    write_page(page, results)
    assert page.read_text() == text
    page.unlink()
    write_page(page, results)
    assert page.read_text() == text


def test_a_page_of_other_content_is_not_overwritten(records, tmp_path) -> None:
    page = tmp_path / 'swap.md'
    page.write_text('mine')
    results = json.loads(to_json(records, [], dict(arch='nano', date='2026-01-01', machine='m', versions='v')))
    with pytest.raises(UserError, match='starts with the mark'):
        write_page(page, results)
    assert page.read_text() == 'mine'


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_all_configs_are_found(scope) -> None:
    names = all_configs(scope)
    assert len(names) > 700 and len(set(names)) == len(names)
    assert all(name.startswith(f'{scope}::') and name.endswith('.py') for name in names)
