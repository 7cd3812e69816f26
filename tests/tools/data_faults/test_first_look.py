"""Most mistakes show before torch is imported, and what the first look does not know it leaves to the whole check."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mila_mm.engine.data.first_look import first_look
from mila_mm.engine.data.kinds import find_kind
from mila_mm.engine.data.splits import Split
from mila_mm.errors import UserError

PROGRAM = """
import sys
from mila_mm.cli.command import main

status = main(sys.argv[1:])
print(status, sorted({'torch', 'mmdet', 'mmseg', 'mmcv', 'timm'} & set(sys.modules)))
"""


def start(config: Path, root: Path) -> tuple[str, str]:
    """Start a training in a process of its own; return what it prints at the end, and its errors."""
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, 'train', str(config), '--cfg-options', 'train_dataloader.batch_size=2'],
        cwd=config.parent,
        env={'PYTHONPATH': str(root), 'PATH': '', 'MILA_HOME': str(config.parent), 'IMAGES': str(config.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout.strip().splitlines()[-1], done.stderr


def empty_box(content: dict) -> None:
    content['annotations'][1]['bbox'] = []


def test_a_fault_of_a_file(detector_of, own, edit, root) -> None:
    edit(own, empty_box)
    ended, said = start(detector_of(own, "work_dir = '{{$IMAGES:.}}/run'"), root)
    assert ended == '2 []', (ended, said)
    assert 'annotations[1].bbox is []' in said


def test_heads_of_another_number(detector_of, own, root) -> None:
    ended, said = start(detector_of(own, 'model["roi_head"]["bbox_head"]["num_classes"] = 80'), root)
    assert ended == '2 []', (ended, said)
    assert 'bbox_head.num_classes is 80' in said


def test_an_absent_file(detector_of, own, root) -> None:
    (own / 'annotations/instances_val.json').unlink()
    ended, said = start(detector_of(own), root)
    assert ended == '2 []', (ended, said)
    assert 'instances_val.json does not exist' in said


def test_a_label_map(segmentor_of, maps, tmp_path, root) -> None:
    folder = maps(tmp_path / 'maps', lambda labels, _: np.where(labels > 0, 77, 0).astype(np.uint8))
    ended, said = start(segmentor_of(folder), root)
    assert ended == '2 []', (ended, said)
    assert 'has value 77' in said


def test_a_signal_during_the_first_look(detector_of, own, root) -> None:
    more = 'import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\ndel os, signal'
    ended, said = start(detector_of(own, more), root)
    assert ended == '75 []', (ended, said)
    assert 'stopped by SIGTERM before the training began' in said


LEFT_ALONE = {
    'another class of that name': "custom_imports = dict(imports=['own_data'])",
    'one that reads its file otherwise': "train_dataloader['dataset']['type'] = 'LVISDataset'",
}


@pytest.mark.parametrize('more', LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_not_known_is_left_alone(detector_of, own, edit, more) -> None:
    edit(own, empty_box)
    first_look(str(detector_of(own, more)), (), ('train',))
    with pytest.raises(UserError, match='bbox'):
        first_look(str(detector_of(own)), (), ('train',))


def test_other_kinds_that_read_their_file_alike(detector_of, own, edit) -> None:
    """Also beside one of CocoDataset's."""
    edit(own, empty_box)
    more = (
        "first = dict(type='CocoDataset', **train_dataloader['dataset'])\n"
        "train_dataloader['dataset'] = dict(_delete_=True, type='ConcatDataset', "
        "datasets=[first, {**first, 'type': 'CityscapesDataset'}])"
    )
    with pytest.raises(UserError, match='bbox'):
        first_look(str(detector_of(own, more)), (), ('train',))


def test_classes_and_defaults_of_other_kinds(detector_of, segmentor_of, own, maps, tmp_path) -> None:
    """Classes of a data set and numbers of a head stand in the source where the config says none."""
    voc = "model['roi_head']['mask_head'].pop('num_classes')\n"
    with pytest.raises(UserError, match=r'mask_head\.num_classes is 80: train_dataloader\.dataset has 6 classes'):
        first_look(str(detector_of(own, voc)), (), ('train',))
    kind = "train_dataloader['dataset'].update(type='LoveDADataset')\ntrain_dataloader['dataset'].pop('metainfo')\n"
    folder = maps(tmp_path / 'maps', lambda labels, _: labels)
    with pytest.raises(UserError, match=r'decode_head\.num_classes is 3.* has 7 classes'):
        first_look(str(segmentor_of(folder, more=kind)), (), ('train',))


def test_label_maps_of_other_kinds(segmentor_of, maps, tmp_path) -> None:
    kind = (
        "train_dataloader['dataset'] = {**train_dataloader['dataset'], 'type': 'LoveDADataset'}\n"
        "train_dataloader['dataset'].pop('metainfo')\ntrain_dataloader['dataset'].pop('img_suffix')\n"
        "for head in ('decode_head', 'auxiliary_head'):\n    model[head]['num_classes'] = 7\ndel head\n"
    )
    folder = maps(tmp_path / 'maps', lambda labels, _: labels + 7)  # of 1 to 7, as LoveDA counts
    with pytest.raises(UserError, match='has value 8, 9, which no class has: the 7 classes are values 1 to 7'):
        first_look(str(segmentor_of(folder, more=kind)), (), ('train',))


def test_large_files_are_left_alone(detector_of, own, edit, monkeypatch) -> None:
    edit(own, empty_box)
    monkeypatch.setattr('mila_mm.engine.data.first_look._LARGE', 100)
    first_look(str(detector_of(own)), (), ('train', 'val'))


def test_sound_sets_pass(detector_of, segmentor_of, own, maps, tmp_path, capfd) -> None:
    first_look(str(detector_of(own)), (), ('train', 'val'))
    first_look(str(segmentor_of(maps(tmp_path / 'maps', lambda labels, _: labels))), (), ('train', 'val'))
    assert capfd.readouterr() == ('', '')


def test_classes_that_the_data_set_has_by_itself(detector_of, own) -> None:
    """COCO's own names are those of its class, which is read and not imported."""
    from mmdet.datasets import CocoDataset

    more = "for loader in (train_dataloader, val_dataloader):\n    loader['dataset'].pop('metainfo')\ndel loader"
    kind = find_kind('DATASETS', {'type': 'CocoDataset'}, 'mmdet')
    assert Split('train', '', {'type': 'CocoDataset'}, kind).classes == CocoDataset.METAINFO['classes']
    with pytest.raises(UserError, match=r'bbox_head\.num_classes is 6.* has 80 classes'):
        first_look(str(detector_of(own, more)), (), ('train', 'val'))


def turn(own: Path) -> None:
    """Let every image bid a quarter turn, as cameras do."""
    for path in own.rglob('*.jpg'):
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.save(path, exif=exif)


def halve(content: dict) -> None:
    for image in content['images']:
        image['width'], image['height'] = image['width'] // 2, image['height'] // 2
    for item in content['annotations']:
        item['bbox'] = [value / 2 for value in item['bbox']]


def as_jpeg(own: Path, edit) -> None:
    """Write the images of a set as JPEGs of 96 x 72, which a turn does not leave as they are."""

    def rename(content: dict) -> None:
        for image in content['images']:
            image['file_name'] = str(Path(image['file_name']).with_suffix('.jpg'))
            image['width'], image['height'] = 96, 72
        for item in content['annotations']:
            item['bbox'] = [4, 4, 20, 20]
            item.pop('segmentation', None)

    edit(own, rename)
    for path in [path for path in own.rglob('*.png') if 'annotations' not in path.parts]:
        with Image.open(path) as image:
            image.convert('RGB').resize((96, 72)).save(path.with_suffix('.jpg'))


PLAIN_LOADING = "LOAD = train_dataloader['dataset']['pipeline'][0]\nassert LOAD['type'] == 'LoadImageFromFile'\n"


def boxes_alone(detector_of, own: Path, more: str = '') -> str:
    """Write a detector that reads boxes and no masks."""
    lines = (
        'for loader in (train_dataloader, val_dataloader):\n'
        "    loader['dataset']['pipeline'] = [\n"
        "        {**step, 'with_mask': False} if step['type'] == 'LoadAnnotations' else step\n"
        "        for step in loader['dataset']['pipeline']]\n"
        "val_evaluator['metric'] = 'bbox'\ndel loader\n"
    )
    return str(detector_of(own, lines + more))


def test_sizes_of_images(detector_of, own, edit) -> None:
    as_jpeg(own, edit)
    config = boxes_alone(detector_of, own)
    first_look(config, (), ('train', 'val'))
    turn(own)
    with pytest.raises(UserError, match=r'is 72 x 96 .*for 96 x 72; turned by its EXIF orientation \((\d+) of \1 '):
        first_look(config, (), ('train', 'val'))
    edit(own, halve)
    with pytest.raises(UserError, match=r'as loaded, its annotations are for 48 x 36 '):
        first_look(config, (), ('train', 'val'))


BROKEN = {
    'absent': (lambda path: path.unlink(), r'does not exist \(1 of \d looked for\)'),
    'of another suffix': (lambda path: path.rename(path.with_suffix('.jpeg')), r'; there is \w+\.(jpeg|png)'),
    'empty': (lambda path: path.write_bytes(b''), r'is empty \(0 bytes\)'),
    'no image': (lambda path: path.write_bytes(b'<html>'), 'cannot be decoded: 6 bytes'),
    'cut short': (lambda path: path.write_bytes(path.read_bytes()[:-200]), 'is cut short|cannot be decoded'),
}


@pytest.mark.parametrize('fault', BROKEN)
def test_images_that_cannot_be_read(refusals, detector_of, own, edit, fault) -> None:
    as_jpeg(own, edit)
    change, words = BROKEN[fault]
    change(next((own / 'images/training').glob('*.jpg')))
    first, whole = refusals(Path(boxes_alone(detector_of, own)), ['train', 'val'])
    assert re.search(words, first), first
    assert first.splitlines()[0] == whole[0]


def test_a_label_map_that_is_absent(refusals, segmentor_of, maps, tmp_path) -> None:
    folder = maps(tmp_path / 'maps', lambda labels, _: labels)
    (folder / 'ann/val/1.png').unlink()
    first, whole = refusals(segmentor_of(folder), ['train', 'val'])
    assert 'ann/val/1.png does not exist (1 of 3 looked for)' in first
    assert first.splitlines()[0] == whole[0]


@pytest.mark.parametrize(
    'more',
    [
        "LOAD['color_type'] = 'color_ignore_orientation'",
        "LOAD['imdecode_backend'] = 'pillow'",
        "LOAD['type'] = 'LoadMultiChannelImageFromFiles'",
        "LOAD['backend_args'] = dict(_delete_=True, backend='petrel')",
        "train_dataloader['dataset']['backend_args'] = dict(_delete_=True, backend='petrel')",
        "train_dataloader['dataset']['indices'] = 1",
    ],
)
def test_images_that_are_loaded_otherwise_are_left_alone(detector_of, own, edit, more) -> None:
    as_jpeg(own, edit)
    turn(own)
    own_lines = f'{PLAIN_LOADING}{more}\ndel LOAD'
    first_look(boxes_alone(detector_of, own, own_lines), (), ('train',))


def test_one_value_in_a_batch_norm(segmentor_of, maps, tmp_path) -> None:
    config = str(segmentor_of(maps(tmp_path / 'maps', lambda labels, _: labels)))
    head = ('model.decode_head.norm_cfg.type=BN', 'model.decode_head.type=UPerHead')
    alone = (*head, 'train_dataloader.batch_size=1')
    with pytest.raises(UserError, match=r'model\.decode_head\.psp_modules\.0\.1\.bn: BatchNorm sees one value'):
        first_look(config, alone, ('train',))
    first_look(config, (*head, 'train_dataloader.batch_size=2'), ('train',))
    first_look(config, (*alone, 'model.decode_head.pool_scales=[2,3]'), ('train',))
    first_look(config, (*alone, 'model.decode_head.norm_cfg.type=LN'), ('train',))
    first_look(config, alone, ('val',))
