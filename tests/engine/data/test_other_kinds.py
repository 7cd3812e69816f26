"""No false alarm: data sets of mmdet with loaders of their own, and those of mmseg without label maps."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from mila_mm.engine.data.check import check_everything

SIZE = 40
BOX = dict(id=1, image_id=1, category_id=1, bbox=[5, 5, 20, 20], area=400, iscrowd=0)
SEGMENT = [[5.0, 5.0, 25.0, 5.0, 25.0, 25.0]]
LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]
IMAGE = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs')]


def image(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    assert cv2.imwrite(str(path), noise)
    return path.name


def coco(folder: Path, names: tuple[str, ...], *, image_fields: Any = (), box_fields: Any = (), **more: Any) -> str:
    entry = dict(id=1, file_name=image(folder / '1.jpg'), width=SIZE, height=SIZE, **dict(image_fields))
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(names)]
    boxes = [{**BOX, **dict(box_fields)}]
    (folder / 'own.json').write_text(json.dumps(dict(images=[entry], annotations=boxes, categories=categories, **more)))
    return 'own.json'


def crowdhuman(folder: Path) -> dict[str, Any]:
    box = dict(fbox=[2, 2, 20, 30], hbox=[2, 2, 9, 9], vbox=[2, 2, 20, 30])
    boxes = [dict(box, tag='person', extra={}), dict(box, tag='mask', extra=dict(ignore=1))]
    image(folder / 'Images/1.jpg')
    (folder / 'annotation_train.odgt').write_text(json.dumps(dict(ID='1', gtboxes=boxes)) + '\n')
    return dict(ann_file='annotation_train.odgt', data_prefix=dict(img='Images/'))


def openimages(folder: Path) -> dict[str, Any]:
    image(folder / 'img/1.jpg')
    (folder / 'labels.csv').write_text('/m/1,Cat\n/m/2,Dog\n')
    (folder / 'tree.json').write_text(
        json.dumps(dict(LabelName='/m/0', Subcategory=[dict(LabelName='/m/1'), dict(LabelName='/m/2')]))
    )
    (folder / 'boxes.csv').write_text('head\n1,xclick,/m/1,1,0.1,0.6,0.1,0.7,0,0,0,0,0\n1,x,/m/2,1,0,1,0,1,0,1,1,0,0\n')
    (folder / 'meta.pkl').write_bytes(pickle.dumps([dict(filename='img/1.jpg', ori_shape=(SIZE, SIZE, 3))]))
    return dict(
        ann_file='boxes.csv',
        data_prefix=dict(img='img/'),
        label_file='labels.csv',
        hierarchy_file='tree.json',
        meta_file='meta.pkl',
    )


def wider_face(folder: Path) -> dict[str, Any]:
    image(folder / '0--Parade/1.jpg')
    (folder / 'Annotations').mkdir()
    (folder / 'list.txt').write_text('1\n')
    (folder / 'Annotations/1.xml').write_text(
        f'<annotation><folder>0--Parade</folder><size><width>{SIZE}</width><height>{SIZE}</height></size>'
        '<object><name>face</name><difficult>0</difficult><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>30</xmax>'
        '<ymax>30</ymax></bndbox></object></annotation>'
    )
    return dict(ann_file='list.txt', data_prefix=dict(img=''))


def v3det(folder: Path) -> dict[str, Any]:
    (folder / 'names.txt').write_text('cat\ndog\n')
    return dict(ann_file=coco(folder, ('cat', 'dog')), data_prefix=dict(img=''), label_file='names.txt')


def odvg(folder: Path) -> dict[str, Any]:
    entry = dict(filename=image(folder / '1.jpg'), height=SIZE, width=SIZE)
    regions = [dict(bbox=[1, 1, 20, 20], phrase='a cat', tokens_positive=[[0, 5]])]
    (folder / 'own.jsonl').write_text(json.dumps(dict(entry, grounding=dict(caption='a cat', regions=regions))) + '\n')
    return dict(ann_file='own.jsonl', data_prefix=dict(img=''), return_classes=True)


def refcoco(folder: Path) -> dict[str, Any]:
    name = coco(folder, ('cat',), box_fields=dict(segmentation=SEGMENT))
    refs = [dict(ref_id=1, ann_id=1, image_id=1, category_id=1, split='train', sentences=[dict(raw='a cat')])]
    (folder / 'refs.p').write_bytes(pickle.dumps(refs))
    return dict(ann_file=name, split_file='refs.p', data_prefix=dict(img_path=''), pipeline=IMAGE)


def panoptic(folder: Path) -> dict[str, Any]:
    from mmdet.datasets import CocoPanopticDataset as Kind

    meta = Kind.METAINFO
    names = [*meta['thing_classes'], *meta['stuff_classes']]
    things = len(meta['thing_classes'])
    ids = np.full((SIZE, SIZE), 70_000)
    ids[:10] = 300
    colours = np.stack([ids // 65536, ids // 256 % 256, ids % 256], -1).astype(np.uint8)  # OpenCV writes BGR
    (folder / 'maps').mkdir()
    cv2.imwrite(str(folder / 'maps/1.png'), colours)
    segments = [
        dict(id=300, category_id=1, bbox=[0, 0, SIZE, 10], area=400, iscrowd=0),
        dict(id=70_000, category_id=things + 1, bbox=[0, 10, SIZE, 30], area=1200, iscrowd=0),
    ]
    content = dict(
        images=[dict(id=1, file_name=image(folder / 'img/1.jpg'), width=SIZE, height=SIZE)],
        annotations=[dict(image_id=1, file_name='1.png', segments_info=segments)],
        categories=[dict(id=i + 1, name=name, isthing=int(i < things)) for i, name in enumerate(names)],
    )
    (folder / 'own.json').write_text(json.dumps(content))
    return dict(ann_file='own.json', data_prefix=dict(img='img/', seg='maps/'), pipeline=IMAGE)


def video(folder: Path) -> dict[str, Any]:
    frame, box = dict(video_id=1, frame_id=0), dict(instance_id=1, mot_conf=1.0, visibility=1.0, video_id=1)
    name = coco(folder, ('pedestrian',), image_fields=frame, box_fields=box, videos=[dict(id=1, name='v')])
    return dict(ann_file=name, data_prefix=dict(img_path=''), pipeline=[])


def youtube_vis(folder: Path) -> dict[str, Any]:
    from mmdet.datasets import YouTubeVISDataset as Kind

    Kind.set_dataset_classes('2019')
    frame, box = dict(video_id=1, frame_id=0), dict(instance_id=1, video_id=1, segmentation=SEGMENT)
    name = coco(folder, Kind.METAINFO['classes'], image_fields=frame, box_fields=box)
    return dict(ann_file=name, data_prefix=dict(img_path=''), dataset_version='2019', pipeline=[])


def reid(folder: Path) -> dict[str, Any]:
    (folder / 'own.txt').write_text(f'{image(folder / "1.jpg")} 0\n')
    return dict(ann_file='own.txt', data_prefix=dict(img_path=''), pipeline=[dict(type='LoadImageFromFile')])


def caption(folder: Path) -> dict[str, Any]:
    (folder / 'own.json').write_text(json.dumps([dict(image=image(folder / '1.jpg'), caption='a cat')]))
    return dict(ann_file='own.json', data_prefix=dict(img_path=''), pipeline=[dict(type='LoadImageFromFile')])


def semantic(folder: Path) -> dict[str, Any]:
    image(folder / 'img/1.jpg')
    (folder / 'maps').mkdir()
    cv2.imwrite(str(folder / 'maps/1.png'), (np.arange(SIZE * SIZE) % 100).reshape(SIZE, SIZE).astype(np.uint8))
    load = dict(type='LoadAnnotations', with_bbox=False, with_mask=False, with_seg=True)
    pipeline = [LOAD[0], load, LOAD[2]]
    return dict(data_prefix=dict(img_path='img', seg_map_path='maps'), pipeline=pipeline)


def phrases(folder: Path) -> dict[str, Any]:
    fields = dict(caption='a cat', tokens_positive_eval=[[[0, 5]]], dataset_name='refcoco')
    name = coco(folder, ('cat',), image_fields=fields, box_fields=dict(phrase_ids=0))
    return dict(ann_file=name, data_prefix=dict(img=''))


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    'CrowdHumanDataset': crowdhuman,
    'OpenImagesDataset': openimages,
    'WIDERFaceDataset': wider_face,
    'V3DetDataset': v3det,
    'ODVGDataset': odvg,
    'RefCocoDataset': refcoco,
    'CocoPanopticDataset': panoptic,
    'MOTChallengeDataset': video,
    'YouTubeVISDataset': youtube_vis,
    'ReIDDataset': reid,
    'CocoCaptionDataset': caption,
    'ADE20KSegDataset': semantic,
    'CocoSegDataset': semantic,
    'Flickr30kDataset': phrases,
    'MDETRStyleRefCocoDataset': phrases,
}


def found(cfg: dict[str, Any], scope: str = 'mmdet') -> list[str]:
    report = check_everything(Config(cfg), ['train'], scope)
    assert report.counts['train_dataloader.dataset']['images'] == 1
    return [str(finding) for finding in report.findings if finding.level != 'note']


@pytest.mark.parametrize('name', KINDS)
def test_kinds_of_mmdet(name, tmp_path) -> None:
    dataset = dict(type=name, data_root=f'{tmp_path}/', pipeline=LOAD)
    dataset.update(KINDS[name](tmp_path))
    head = dict(type='RetinaHead', in_channels=4, num_classes=1)  # of a class; the names are in the files
    count = dict(V3DetDataset=2, OpenImagesDataset=2, YouTubeVISDataset=40).get(name)
    head.update(dict(num_classes=count) if count else {})
    plain = name not in ('CocoPanopticDataset', 'ADE20KSegDataset', 'CocoSegDataset', 'RefCocoDataset')
    model = dict(type='RetinaNet', bbox_head=head) if plain else dict(type='MaskFormer')
    assert not found(dict(model=model, train_dataloader=dict(dataset=dataset)))


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda m: m[..., 0], 'uint8 of 1 channels'),
        (lambda m: m[:20], 'is 40 x 20'),
        (lambda m: m[..., ::-1], 'holds none of the segments'),
        (lambda m: np.where(m == m[0, 0], 0, m).astype(np.uint8), 'lacks 300'),
        (
            lambda m: np.concatenate([m[:-2], np.full_like(m[:2], 9)]),
            'holds 592137, which',
        ),
    ],
)
def test_maps_of_a_panoptic_set(change, words, tmp_path) -> None:
    dataset = dict(type='CocoPanopticDataset', data_root=str(tmp_path), **panoptic(tmp_path))
    path = str(tmp_path / 'maps/1.png')
    cv2.imwrite(path, np.ascontiguousarray(change(cv2.imread(path))))
    told = found(dict(model=dict(type='MaskFormer'), train_dataloader=dict(dataset=dataset)))
    assert len(told) == 1 and words in told[0], told


@pytest.mark.parametrize('value', [182, 183, 255])
def test_maps_beside_the_boxes(value, tmp_path) -> None:
    name = coco(tmp_path / 'img', ('cat',), box_fields=dict(segmentation=SEGMENT))
    (tmp_path / 'maps').mkdir()
    labels = np.full((SIZE, SIZE), value, np.uint8)
    labels[:20], labels[:5] = 1, 2
    cv2.imwrite(str(tmp_path / 'maps/1.png'), labels)
    load = dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True)
    dataset = dict(
        type='CocoDataset',
        metainfo=dict(classes=('cat',)),
        data_root=str(tmp_path),
        ann_file=f'img/{name}',
        data_prefix=dict(img='img/', seg='maps/'),
        pipeline=[LOAD[0], load, LOAD[2]],
    )
    heads = dict(
        type='HybridTaskCascadeRoIHead',
        bbox_head=dict(type='Shared2FCBBoxHead', num_classes=1),
        semantic_head=dict(type='FusedSemanticHead'),
    )
    told = found(dict(model=dict(type='HybridTaskCascade', roi_head=heads), train_dataloader=dict(dataset=dataset)))
    assert len(told) == (value == 183)
    assert all('has value 183, which no class has: the 183 classes are values 0 to 182' in line for line in told)


def depth(folder: Path) -> dict[str, Any]:
    image(folder / 'images/1.jpg')
    (folder / 'annotations').mkdir()
    cv2.imwrite(str(folder / 'annotations/1.png'), np.full((SIZE, SIZE), 5000, np.uint16))
    return dict(type='NYUDataset', data_prefix=dict(img_path='images', depth_map_path='annotations'))


def changes(folder: Path) -> dict[str, Any]:
    for name in ('a', 'b'):
        image(folder / name / '1.png')
    (folder / 'maps').mkdir()
    cv2.imwrite(str(folder / 'maps/1.png'), (np.arange(SIZE * SIZE) % 2 * 255).reshape(SIZE, SIZE).astype(np.uint8))
    return dict(type='LEVIRCDDataset', data_prefix=dict(img_path='a', img_path2='b', seg_map_path='maps'))


@pytest.mark.parametrize(
    ('write', 'load'),
    [(depth, ['LoadImageFromFile', 'LoadDepthAnnotation']), (changes, ['LoadMultipleRSImageFromFile'])],
)
def test_kinds_of_mmseg_without_plain_label_maps(write, load, tmp_path) -> None:
    pipeline = [dict(type=name) for name in [*load[:1], *load[1:], 'PackSegInputs'] if 'RS' not in name]
    dataset = dict(data_root=str(tmp_path), pipeline=pipeline, **write(tmp_path))
    head = dict(type='VPDDepthHead') if write is depth else dict(type='FCNHead', num_classes=2)
    cfg = dict(model=dict(type='EncoderDecoder', decode_head=head), train_dataloader=dict(dataset=dataset))
    told = found(cfg, 'mmseg')
    assert not told, told
