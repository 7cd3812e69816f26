"""mila check-data: everything at once."""

import json
import shutil
from pathlib import Path

import pytest

from mila_mm.cli import execute
from mila_mm.cli.check_data import main
from mila_mm.datasets.shapes import COCO_CLASSES, write_shapes

CONFIG = """
_base_ = {base!r}
root = {root!r}
classes = {classes!r}
data = dict(data_root=root, metainfo=dict(classes=classes))
model = dict(roi_head=dict(bbox_head=dict(num_classes=6), mask_head=dict(num_classes={heads})))
train_dataloader = dict(dataset=dict(
    **data, ann_file='annotations/instances_train.json', data_prefix=dict(img='images/training')))
val_dataloader = dict(dataset=dict(
    **data, ann_file='annotations/instances_val.json', data_prefix=dict(img='images/validation')))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=root + '/annotations/instances_val.json')
test_evaluator = val_evaluator
"""


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=4, num_val=2, size=64, seed=0)


def write(folder: Path, data: Path, root: Path, heads: int = 6) -> str:
    base = str(root / 'configs/mask_rcnn_mila_t_1x_single_scale.py')
    path = folder / 'own.py'
    path.write_text(CONFIG.format(base=base, root=str(data), classes=tuple(COCO_CLASSES), heads=heads))
    return str(path)


def test_counts_of_a_sound_set(made, tmp_path, root, capsys) -> None:
    assert execute(main, [write(tmp_path, made, root)]) == 0
    out = capsys.readouterr().out
    content = json.loads((made / 'annotations/instances_train.json').read_text())
    assert f'train_dataloader.dataset: 4 images, {len(content["annotations"])} boxes' in out
    assert '0 errors, 0 warnings' in out


def test_everything_at_once_as_json(made, tmp_path, root, capsys) -> None:
    data = Path(shutil.copytree(made, tmp_path / 'own'))
    for split, field in (('train', 'bbox'), ('val', 'area')):
        path = data / f'annotations/instances_{split}.json'
        content = json.loads(path.read_text())
        content['annotations'][0][field] = 'x'
        path.write_text(json.dumps(content))
    assert execute(main, [write(tmp_path, data, root, heads=80), '--json', '--sample', '1']) == 2
    out, err = capsys.readouterr()
    report = json.loads(out)
    told = ' '.join(finding['where'] + finding['message'] for finding in report['findings'])
    for words in ('annotations[0].bbox', 'annotations[0].area', 'mask_head.num_classes is 80'):
        assert words in told
    assert report['errors'] == 3
    assert err.startswith('error: 3 errors')


def test_files_that_are_not_there_are_among_the_rest(tmp_path, root, capsys) -> None:
    assert execute(main, [write(tmp_path, tmp_path / 'nowhere', root, heads=80)]) == 2
    out = capsys.readouterr().out
    assert 'nowhere' in out and 'does not exist' in out and 'num_classes is 80' in out


def test_a_sample_is_a_number(tmp_path, root, capsys) -> None:
    assert execute(main, [write(tmp_path, tmp_path, root), '--sample', '-1']) == 2


@pytest.mark.parametrize(
    ('name', 'config', 'counts'),
    [
        ('coco8', 'mask_rcnn_mila_t_1x_single_scale', {'train': 13, 'val': 17}),
        ('ade8', 'upernet_mila_t_160k', {'train': 4, 'val': 4}),
    ],
)
def test_real_images(sample_data, tmp_path, root, capsys, name, config, counts) -> None:
    data = sample_data / name
    metric = (
        f"\nval_evaluator = dict(ann_file='{data}/annotations/instances_val2017.json')\ntest_evaluator = val_evaluator"
    )
    path = tmp_path / 'real.py'
    path.write_text(
        f"_base_ = '{root}/configs/{config}.py'\n"
        + ''.join(
            f"{split}_dataloader = dict(dataset=dict(data_root='{data}/'))\n" for split in ('train', 'val', 'test')
        )
        + (f'{metric}test_evaluator = val_evaluator\n' if name == 'coco8' else '')
    )
    assert execute(main, [str(path), '--json']) == 0
    report = json.loads(capsys.readouterr().out)
    assert report['warnings'] == 0, report['findings']
    unit = 'boxes_loaded' if name == 'coco8' else 'label_maps_seen'
    assert {split: report['counts'][f'{split}_dataloader.dataset'][unit] for split in counts} == counts
