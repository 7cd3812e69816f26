"""No false alarm: tiny sets in the layout of every kind of data set that both libraries know."""

import inspect
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS

from mila_mm.engine.data.check import check_everything
from mila_mm.engine.data.splits import resolve, splits_of
from mila_mm.engine.data.static import check_static

SIZE = 40


def seg_kinds() -> list[str]:
    """Return the data sets of mmseg that pair images with label maps."""
    with DATASETS.switch_scope_and_registry('mmseg') as registry:
        registry.get('BaseSegDataset')
        names = sorted(registry.module_dict)
    kinds = [(name, resolve(DATASETS, name, 'mmseg')) for name in names]
    # BaseSegDataset has no classes of its own; NYU's maps are of depth, volumes need packages of their own
    others = ('BaseSegDataset', 'BaseCDDataset', 'NYUDataset', 'DSDLSegDataset', 'HSIDrive20Dataset', 'LEVIRCDDataset')
    return [
        name
        for name, kind in kinds
        if name not in others
        and kind is not None
        and isinstance(getattr(kind, 'METAINFO', None), dict)
        and kind.METAINFO.get('classes')
        and any(base.__name__ == 'BaseSegDataset' for base in kind.__mro__)
        and 'OneDL' not in name
        and 'Dsdl' not in name
    ]


@pytest.fixture(scope='module')
def images(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)


@pytest.mark.parametrize('name', seg_kinds())
def test_label_maps_of_mmseg(name, images, tmp_path) -> None:
    kind = resolve(DATASETS, name, 'mmseg')
    count = len(kind.METAINFO['classes'])
    listed = 'ann_file' in inspect.signature(kind.__init__).parameters
    (tmp_path / 'list.txt').write_text('0\n1\n')
    prefix = dict(img_path=str(tmp_path), seg_map_path=str(tmp_path))
    bare = kind(lazy_init=True, data_prefix=prefix, **(dict(ann_file=str(tmp_path / 'list.txt')) if listed else {}))
    reduced, suffixes = bare.reduce_zero_label, (bare.img_suffix, bare.seg_map_suffix)
    for folder in ('img', 'ann'):
        (tmp_path / folder).mkdir()
    values = np.arange(SIZE * SIZE) % (count + reduced)
    labels = values.reshape(SIZE, SIZE).astype(np.uint8)
    if not reduced:
        labels[:3] = 255
    for number in range(2):
        cv2.imwrite(str(tmp_path / 'img' / f'{number}.png'), images)
        (tmp_path / 'img' / f'{number}.png').rename(tmp_path / 'img' / f'{number}{suffixes[0]}')
        cv2.imwrite(str(tmp_path / 'ann' / 'map.png'), labels)
        (tmp_path / 'ann' / 'map.png').rename(tmp_path / 'ann' / f'{number}{suffixes[1]}')
    dataset = dict(
        type=name,
        data_root=str(tmp_path),
        data_prefix=dict(img_path='img', seg_map_path='ann'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
    )
    if listed:
        (tmp_path / 'list.txt').write_text('0\n1\n')
        dataset['ann_file'] = 'list.txt'
    head = dict(type='FCNHead', in_channels=4, channels=4, num_classes=count)
    cfg = Config(dict(model=dict(type='EncoderDecoder', decode_head=head), train_dataloader=dict(dataset=dataset)))
    report = check_everything(cfg, ['train'], 'mmseg')
    assert not [str(finding) for finding in report.findings if finding.level != 'note']
    assert report.counts['train_dataloader.dataset']['label_maps_seen'] == 2


def coco(folder: Path, classes: tuple[str, ...], images: np.ndarray, **fields: Any) -> None:
    """Write two images and as many boxes as classes, in COCO's layout, one of them a crowd."""
    (folder / 'img').mkdir()
    for number in range(2):
        cv2.imwrite(str(folder / 'img' / f'{number}.png'), images)
    annotations = [
        dict(
            id=index + 1,
            image_id=index % 2,
            category_id=index + 1,
            bbox=[5, 5, 20, 20],
            area=400,
            iscrowd=int(index == 0 and len(classes) > 2),
            segmentation=[[5, 5, 25, 5, 25, 25, 5, 25]],
            **fields,
        )
        for index in range(len(classes))
    ]
    if len(classes) > 2:
        annotations[0]['segmentation'] = dict(size=[SIZE, SIZE], counts=[5, 20, SIZE * SIZE - 25])
    content = dict(
        images=[dict(id=n, file_name=f'{n}.png', width=SIZE, height=SIZE) for n in range(2)],
        annotations=annotations,
        categories=[dict(id=index + 1, name=name) for index, name in enumerate(classes)],
    )
    (folder / 'own.json').write_text(json.dumps(content))


DETECTOR = dict(type='RetinaNet', bbox_head=dict(type='RetinaHead', in_channels=4))
PIPELINE = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]


def checked(dataset: dict[str, Any], count: int) -> Any:
    model = dict(DETECTOR, bbox_head=dict(DETECTOR['bbox_head'], num_classes=count))
    cfg = Config(dict(model=model, train_dataloader=dict(dataset=dict(pipeline=PIPELINE, **dataset))))
    return check_everything(cfg, ['train'], 'mmdet')


@pytest.mark.parametrize(
    'name',
    [
        'CocoDataset',
        'CityscapesDataset',
        'DeepFashionDataset',
        'iSAIDDataset',
        'Objects365V1Dataset',
        'Objects365V2Dataset',
        'ADE20KInstanceDataset',
    ],
)
def test_files_of_mmdet(name, images, tmp_path) -> None:
    classes = tuple(resolve(DATASETS, name, 'mmdet').METAINFO['classes'])
    coco(tmp_path, classes, images)
    filters = dict(filter_empty_gt=True, min_size=32)
    dataset = dict(type=name, data_root=str(tmp_path), ann_file='own.json', data_prefix=dict(img='img/'))
    report = checked(dict(**dataset, filter_cfg=filters), len(classes))
    assert not [str(finding) for finding in report.findings if finding.level != 'note']
    assert report.counts['train_dataloader.dataset']['images'] == 2


def test_lvis_has_neither_file_names_nor_crowds(images, tmp_path) -> None:
    pytest.importorskip('lvis')
    classes = tuple(resolve(DATASETS, 'LVISV1Dataset', 'mmdet').METAINFO['classes'])
    coco(tmp_path, classes, images)
    content = json.loads((tmp_path / 'own.json').read_text())
    for image in content['images']:
        image['coco_url'] = f'http://images.cocodataset.org/img/{image.pop("file_name")}'
    for annotation in content['annotations']:
        del annotation['iscrowd']
    (tmp_path / 'own.json').write_text(json.dumps(content))
    dataset = dict(type='LVISV1Dataset', data_root=str(tmp_path), ann_file='own.json', data_prefix=dict(img=''))
    assert not checked(dataset, len(classes)).of('error')


@pytest.mark.parametrize('unknown', [False, True])
def test_xml_of_voc(images, tmp_path, unknown) -> None:
    for folder in ('VOC2007/JPEGImages', 'VOC2007/Annotations'):
        (tmp_path / folder).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / 'VOC2007/JPEGImages/0.jpg'), images)
    names = ('cat', 'dog', 'person ' if unknown else 'person')
    objects = ''.join(
        f'<object><name>{name}</name><difficult>{int(name == "dog")}</difficult><bndbox><xmin>3</xmin><ymin>3</ymin>'
        '<xmax>30</xmax><ymax>30</ymax></bndbox></object>'
        for name in names
    )
    size = f'<size><width>{SIZE}</width><height>{SIZE}</height></size>'
    (tmp_path / 'VOC2007/Annotations/0.xml').write_text(f'<annotation>{size}{objects}</annotation>')
    (tmp_path / 'list.txt').write_text('0\n')
    dataset = dict(
        type='VOCDataset', data_root=str(tmp_path), ann_file='list.txt', data_prefix=dict(sub_data_root='VOC2007/')
    )
    report = checked(dataset, 20)
    found = [str(finding) for finding in report.findings if finding.level != 'note']
    if unknown:
        assert len(found) == 1 and "1 of 3 objects are of no class and are not used: 'person '" in found[0]
    else:
        assert not found


def test_panoptic_classes_are_things_and_stuff() -> None:
    kind = resolve(DATASETS, 'CocoPanopticDataset', 'mmdet')
    things = len(kind.METAINFO['thing_classes'])
    stuff = len(kind.METAINFO['stuff_classes'])
    head = dict(type='MaskFormerHead', num_things_classes=things, num_stuff_classes=stuff)
    dataset = dict(type='CocoPanopticDataset', ann_file='own.json', data_prefix=dict(img='img/', seg='seg/'))
    for number, errors in ((stuff, 0), (stuff - 1, 1)):
        head['num_stuff_classes'] = number
        cfg = Config(dict(model=dict(type='MaskFormer', panoptic_head=head), train_dataloader=dict(dataset=dataset)))
        findings = check_static(cfg, ['train'], 'mmdet', splits_of(cfg, ['train'], 'mmdet'))
        found = [finding for finding in findings if finding.level == 'error']
        assert len(found) == errors, found
        assert all('panoptic_head.num_stuff_classes is 52' in str(finding) for finding in found)
