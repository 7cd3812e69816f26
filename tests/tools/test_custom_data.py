"""docs/custom_data.md: its blocks are written and run as they stand there, on small data and with a small model."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from mila_mm.cli import command
from mila_mm.datasets.shapes import write_shapes

CLASSES = ('circle', 'square', 'triangle')
# What makes the page's models small; everything else is as the page has it.
SMALL = {
    'my_detector.py': """
model['backbone'] = dict(arch='nano', drop_path_rate=0.0)
model['neck'] = dict(in_channels=[32, 64, 128, 256], out_channels=16)
model['rpn_head'] = dict(in_channels=16, feat_channels=16)
model['roi_head']['bbox_roi_extractor'] = model['roi_head']['mask_roi_extractor'] = dict(out_channels=16)
model['roi_head']['bbox_head'].update(in_channels=16, fc_out_channels=32)
model['roi_head']['mask_head'].update(in_channels=16, conv_out_channels=16, num_convs=1)
size = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
size += [dict(type='Resize', scale=(64, 64), keep_ratio=True), dict(type='PackDetInputs')]
train_dataloader['dataset']['pipeline'] = size
meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
val_dataloader['dataset']['pipeline'] = [size[0], size[2], size[1], dict(type='PackDetInputs', meta_keys=meta)]
model['test_cfg'] = dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(max_per_img=5))
model['train_cfg'] = dict(rpn_proposal=dict(nms_pre=50, max_per_img=20))
train_cfg = dict(max_epochs=1)
""",
    'my_segmentor.py': """
crop_size = (64, 64)
model['data_preprocessor'] = dict(size=crop_size)
model['backbone'] = dict(arch='nano', drop_path_rate=0.0)
model['decode_head'].update(in_channels=[32, 64, 128, 256], channels=16)
model['auxiliary_head'].update(in_channels=128, channels=16)
train_pipeline[2].update(scale=(128, 64))
train_pipeline[3].update(crop_size=crop_size)
test_pipeline[1].update(scale=(128, 64))
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
""",
}
LOADERS = """
for loader in (train_dataloader, val_dataloader):
    loader.update(num_workers=0, persistent_workers=False)
train_dataloader['batch_size'] = 2
"""
# mmengine's configs keep no loop variables out
ENDINGS = {name: f'{text}{LOADERS}del loader\n' for name, text in SMALL.items()}


@pytest.fixture(scope='module')
def blocks(root: Path) -> dict[str, str]:
    """Return the page's programs by the name in their first line, and its commands by the config in them."""
    text = (root / 'docs/custom_data.md').read_text()
    found = {}
    for language, body in re.findall(r'```(python|bash)\n(.*?)```', text, re.S):
        if language == 'python':
            found[re.match(r'# (\S+)', body).group(1)] = body
        else:
            found[f'commands of {re.search("my_[a-z]+.py", body).group()}'] = body
    return found


def run(line: str) -> None:
    words = shlex.split(line.replace(' --pretrained mila://tiny-in1k', ''))
    words = [word.replace('epoch_12', 'epoch_1').replace('iter_160000', 'iter_2') for word in words]
    assert words[0] == 'mila'
    assert command.main(words[1:]) == 0, line


def coco_of_three_classes(folder: Path, data: Path) -> None:
    (folder / 'data/mine').mkdir(parents=True)
    for split, images in (('train', 'training'), ('val', 'validation')):
        content = json.loads((data / f'annotations/instances_{split}.json').read_text())
        content['categories'] = [item for item in content['categories'] if item['name'] in CLASSES]
        ids = {item['id'] for item in content['categories']}
        content['annotations'] = [item for item in content['annotations'] if item['category_id'] in ids]
        (folder / f'data/mine/{split}.json').write_text(json.dumps(content))
        shutil.copytree(data / 'images' / images, folder / 'data/mine' / split)


@pytest.fixture(scope='module')
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=6, num_val=2, size=64, seed=0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setenv('MILA_HOME', str(tmp_path / 'home'))
    return tmp_path


def test_a_coco_json_of_three_classes(folder, made, blocks) -> None:
    coco_of_three_classes(folder, made)
    Path('my_detector.py').write_text(blocks['my_detector.py'] + ENDINGS['my_detector.py'])
    for line in blocks['commands of my_detector.py'].splitlines():
        run(line)
    assert Path('analysis/index.html').is_file()
    assert any(Path('predictions').rglob('*.png')) and any(Path('browse').iterdir())


def test_a_folder_of_binary_masks(folder, blocks) -> None:
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for sub in ('images', 'labels'):
            (folder / 'data/maps' / sub / split).mkdir(parents=True)
        for number in range(2):
            mask = np.zeros((64, 64), np.uint8)
            mask[10:40, 10:50] = 255
            image = rng.integers(0, 90, (64, 64, 3), np.uint8) + (mask > 0)[..., None].astype(np.uint8) * 100
            cv2.imwrite(f'data/maps/images/{split}/{number}.jpg', image)
            cv2.imwrite(f'data/maps/labels/{split}/{number}.png', mask)
    Path('my_segmentor.py').write_text(blocks['my_segmentor.py'] + ENDINGS['my_segmentor.py'])
    assert command.main(['check-data', 'my_segmentor.py']) == 2  # until 255 is written as 1
    Path('binary_masks.py').write_text(blocks['binary_masks.py'])
    runpy.run_path('binary_masks.py')
    for line in blocks['commands of my_segmentor.py'].splitlines():
        run(line)
    assert Path('analysis/index.html').is_file()


def test_yolo_to_coco(folder, blocks) -> None:
    pytest.importorskip('supervision')
    for split in ('train', 'val'):
        for sub in ('images', 'labels'):
            (folder / 'yolo' / split / sub).mkdir(parents=True)
        cv2.imwrite(f'yolo/{split}/images/0.jpg', np.full((64, 48, 3), 90, np.uint8))
        Path(f'yolo/{split}/labels/0.txt').write_text('0 0.5 0.5 0.5 0.5\n2 0.25 0.25 0.2 0.2\n')
    Path('yolo/data.yaml').write_text(f'names: {list(CLASSES)}\nnc: 3\n')
    Path('yolo_to_coco.py').write_text(blocks['yolo_to_coco.py'])
    runpy.run_path('yolo_to_coco.py')
    content = json.loads(Path('data/mine/train.json').read_text())
    assert [item['name'] for item in content['categories']] == list(CLASSES)
    assert len(content['annotations']) == 2
    assert Path('data/mine/train/0.jpg').is_file()


def test_voc_to_coco(folder) -> None:
    sv = pytest.importorskip('supervision')
    from mila_mm.datasets.checks.coco_annotations import check_entries, read_coco
    from mila_mm.datasets.checks.needs import Needs

    for name in ('images', 'annotations'):
        Path('voc', name).mkdir(parents=True)
    cv2.imwrite('voc/images/0.jpg', np.full((64, 48, 3), 90, np.uint8))
    objects = ''.join(
        f'<object><name>{name}</name><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>'
        for name in ('square', 'circle')
    )
    size = '<size><width>48</width><height>64</height><depth>3</depth></size>'
    Path('voc/annotations/0.xml').write_text(f'<annotation><filename>0.jpg</filename>{size}{objects}</annotation>')
    data = sv.DetectionDataset.from_pascal_voc('voc/images', 'voc/annotations')
    data.as_coco('data/mine/train', 'data/mine/train.json')
    content = read_coco(Path('data/mine/train.json'))
    assert not [found for found in check_entries(content, '', Needs()) if found.level == 'error']
    assert sorted(item['name'] for item in content['categories']) == ['circle', 'square']
    # VOC counts pixels from 1 and both ends in
    assert [item['bbox'] for item in content['annotations']] == [[4, 5, 16, 25]] * 2


def test_an_export_of_label_studio(folder) -> None:
    """As label-studio writes COCO: "images" beside result.json, in file_name too, ids from 0, no "iscrowd" at times."""
    from mmengine.config import Config

    from mila_mm.engine.data.check import check_everything

    Path('export/images').mkdir(parents=True)
    cv2.imwrite('export/images/0.jpg', np.full((64, 48, 3), 90, np.uint8))
    box = dict(id=0, image_id=0, category_id=0, segmentation=[], bbox=[5, 6, 15, 24], ignore=0, iscrowd=0, area=360)
    content = dict(
        images=[dict(width=48, height=64, id=0, file_name='images/0.jpg')],
        categories=[dict(id=0, name='circle')],
        annotations=[box],
        info=dict(contributor='Label Studio'),
    )
    Path('export/result.json').write_text(json.dumps(content))
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='PackDetInputs'),
    ]
    dataset = dict(
        type='CocoDataset',
        metainfo=dict(classes=('circle',)),
        data_root='export/',
        ann_file='result.json',
        data_prefix=dict(img=''),
        pipeline=pipeline,
    )
    head = dict(type='RetinaHead', in_channels=4, num_classes=1)
    cfg = Config(dict(model=dict(type='RetinaNet', bbox_head=head), train_dataloader=dict(dataset=dataset)))
    report = check_everything(cfg, ['train'], 'mmdet')
    assert not [str(found) for found in report.findings if found.level != 'note']
    assert report.counts['train_dataloader.dataset']['boxes_loaded'] == 1
