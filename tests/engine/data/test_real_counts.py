"""Counts of real annotation files, against a few lines of Python that follow mmdet's loader by themselves."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from mmengine.config import Config

from mila_mm.datasets.checks.findings import Report
from mila_mm.engine.data.files import check_files
from mila_mm.engine.data.kinds import find_kind
from mila_mm.engine.data.splits import Split

DATA = Path(os.environ.get('MILA_MM_SAMPLE_DATA', Path(__file__).resolve().parents[4] / 'shared' / 'data'))
FILES = ('bccd/train', 'bccd/val', 'bccd/test', 'nuclei/train', 'nuclei/val')
FILES += ('coco8/instances_train2017', 'coco8/instances_val2017')


@pytest.mark.parametrize('name', FILES)
def test_counts_of_real_files(name: str) -> None:
    folder, _, stem = name.partition('/')
    path = DATA / folder / 'annotations' / f'{stem}.json'
    if not path.is_file():
        pytest.skip(f'no {path}')
    data = json.loads(path.read_text())
    names = {category['id']: category['name'] for category in data['categories']}
    sizes = {image['id']: (image['width'], image['height']) for image in data['images']}
    boxes: Counter[str] = Counter()
    for item in data['annotations']:
        x, y, w, h = item['bbox']
        width, height = sizes[item['image_id']]
        inside = max(0, min(x + w, width) - max(x, 0)) * max(0, min(y + h, height) - max(y, 0))
        if inside and item['area'] > 0 and w >= 1 and h >= 1 and not item.get('ignore'):
            boxes['(crowd)' if item['iscrowd'] else names[item['category_id']]] += 1
    dataset = dict(type='CocoDataset', ann_file=str(path), metainfo=dict(classes=list(names.values())))
    report = Report()
    check_files(
        Config(dict(model=dict(type='RetinaNet'))),
        [Split('train', 'train', dataset, find_kind('DATASETS', dataset, 'mmdet'))],
        None,
        report,
    )
    counts = report.counts['train']
    assert not report.of('error') and not report.of('warning')
    assert (counts['images'], counts['boxes']) == (len(sizes), len(data['annotations']))
    assert counts['crowd'] == boxes.pop('(crowd)', 0)
    assert counts['boxes_loaded'] == sum(boxes.values())
    assert {name: number for name, number in counts['per_class'].items() if number} == boxes
