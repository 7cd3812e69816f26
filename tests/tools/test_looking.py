"""mila browse and mila analyze: pictures of what goes in, and of what came out."""

import json
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mila_mm.datasets import write_shapes
from mila_mm.engine.analysis.detections import Image, Objects, summarise
from mila_mm.engine.analysis.label_maps import confusion_of, intersection_over_union, per_class
from mila_mm.engine.analysis.report import occurring
from mila_mm.engine.data.browse import as_rgb, browse
from mila_mm.visualization.name_places import NamePlaces


@pytest.mark.parametrize('kind', ['detector', 'segmentor'])
def test_browse_draws_what_the_model_sees(command, request, workspace, kind) -> None:
    config = request.getfixturevalue(kind)
    ended = command('browse.py', config, '--number', '3', '--out', 'seen')
    assert ended.status == 0, ended.err
    pictures = sorted((workspace / 'seen').iterdir())
    assert len(pictures) == 3
    assert all(cv2.imread(str(picture)) is not None for picture in pictures)


def test_annotations_of_validation_are_drawn_where_they_are(tmp_path, monkeypatch) -> None:
    """Their pipelines load them in the size of the file, behind the resize, and pad the batch and not the masks."""
    folder = write_shapes(tmp_path / 'shapes', 1, 1, 48, 0)
    steps = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(90, 90), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='PackDetInputs'),
    ]
    classes = json.loads((folder / 'annotations/instances_val.json').read_text())['categories']
    dataset = dict(
        type='CocoDataset',
        ann_file=str(folder / 'annotations/instances_val.json'),
        data_prefix=dict(img=str(folder / 'images/validation')),
        metainfo=dict(classes=[each['name'] for each in classes]),
        test_mode=True,
        pipeline=steps,
    )
    loader = dict(batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
    preprocessor = dict(type='DetDataPreprocessor', pad_size_divisor=32, pad_mask=True)
    cfg = Config(dict(default_scope='mmdet', model=dict(data_preprocessor=preprocessor), val_dataloader=loader))
    drawn = []
    monkeypatch.setattr(
        'mila_mm.engine.data.browse._enlarge', lambda image, sample: drawn.append((image, sample)) or (image, sample)
    )
    browse(cfg, 'val', 1, tmp_path / 'out', False)
    image, sample = drawn[0]
    assert image.shape == (90, 90, 3)
    masks, boxes = sample.gt_instances.masks.to_ndarray(), sample.gt_instances.bboxes
    assert masks.shape[1:] == (90, 90) and len(masks) == len(boxes) > 0
    for mask, box in zip(masks, boxes.tolist(), strict=True):
        rows, columns = np.nonzero(mask)
        assert np.allclose(box, [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=3)


@pytest.mark.parametrize('turned', [True, False])
def test_pictures_have_the_colours_of_the_file(turned) -> None:
    from mmdet.models import DetDataPreprocessor

    loaded = np.zeros((8, 8, 3), np.uint8)
    loaded[..., 0] = 200  # blue, as OpenCV loads it
    options = dict(mean=[10.0, 20.0, 30.0], std=[2.0, 3.0, 4.0], bgr_to_rgb=turned)
    preprocessor = DetDataPreprocessor(**options)
    seen = preprocessor({'inputs': [torch.from_numpy(loaded).permute(2, 0, 1)], 'data_samples': None}, True)
    assert (as_rgb(seen['inputs'][0], preprocessor) == (0, 0, 200)).all()


def test_browse_refuses_what_it_cannot_show(command, refused, detector, monkeypatch) -> None:
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    refused(command('browse.py', detector, '--show'), 'display')
    refused(command('browse.py', detector, '--number', '0'), '--number')


def test_analyze_a_detector(command, detector, trained_detector, workspace) -> None:
    ended = command('analyze.py', detector, trained_detector, '--out', 'out', '--worst', '1', '--score-thr', '0.01')
    assert ended.status == 0, ended.err
    report = json.loads((workspace / 'out/analysis.json').read_text())
    assert set(report['AP by class']) == {'circle', 'square', 'triangle', 'star', 'cross', 'ring'}
    page = (workspace / 'out/index.html').read_text()
    for name in ('confusion.png', 'precision_recall.png', 'errors.png'):
        assert f'src="{name}"' in page
        assert cv2.imread(str(workspace / 'out' / name)) is not None
    assert len(list((workspace / 'out/worst').iterdir())) == 1


def test_analyze_a_segmentor(command, segmentor, trained_segmentor, workspace) -> None:
    ended = command('analyze.py', segmentor, trained_segmentor, '--out', 'out', '--worst', '1')
    assert ended.status == 0, ended.err
    report = json.loads((workspace / 'out/analysis.json').read_text())
    ious = [row['iou'] for row in report['IoU by class'].values()]
    assert 100 * np.nanmean(ious) == pytest.approx(report['metrics']['mIoU'], abs=0.02)
    assert len(list((workspace / 'out/worst').iterdir())) == 1


def test_rows_of_what_does_not_occur_are_left_out() -> None:
    nan = float('nan')
    by_class = {
        'there': {'ap': 0.0, 'ap50': 0.0, 'truth': 3, 'found': 0},
        'found alone': {'ap': nan, 'ap50': nan, 'truth': 0, 'found': 2},
        'nowhere': {'ap': nan, 'ap50': nan, 'truth': 0, 'found': 0},
    }
    assert list(occurring(by_class)) == ['there', 'found alone']
    by_pixels = {
        'found alone': {'iou': 0.0, 'accuracy': nan, 'pixels': 0},
        'nowhere': {'iou': nan, 'accuracy': nan, 'pixels': 0},
    }
    assert list(occurring(by_pixels)) == ['found alone']
    assert occurring({'missed': {'errors': 0}}) == {'missed': {'errors': 0}}


def objects(*boxes: tuple[float, ...], labels: tuple[int, ...], scores: tuple[float, ...] = ()) -> Objects:
    count = len(boxes)
    return Objects(
        np.asarray(boxes, float).reshape(-1, 4),
        np.asarray(labels, int),
        np.asarray(scores or [1.0] * count, float),
        np.zeros(count, bool),
    )


def test_each_kind_of_error_is_told_from_the_others() -> None:
    truth = objects((0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 60, 60), (80, 80, 90, 90), labels=(0, 1, 0, 1))
    found = objects(
        (0, 0, 10, 10),  # a hit
        (0, 0, 10, 10),  # found twice
        (20, 20, 30, 30),  # of another class
        (56, 50, 66, 60),  # beside its object
        (86, 80, 96, 90),  # beside, and of another class
        (200, 200, 210, 210),  # on nothing
        labels=(0, 0, 0, 0, 0, 1),
        scores=(0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    )
    summary = summarise([Image('a.jpg', (256, 256), truth, found)], ('a', 'b'), 0.3, masks=False)
    assert dict(summary.kinds) == {
        'duplicate': 1,
        'class': 1,
        'location': 1,
        'class and location': 1,
        'background': 1,
        'missed': 1,  # what stands beside counts for the object it was meant for
    }
    assert summary.confusion.tolist() == [[1, 0, 1], [1, 0, 1], [3, 1, 0]]
    assert summary.kinds_by_size['small'] == summary.kinds
    assert summary.errors == [6]


def test_a_surer_detection_of_another_class_does_not_take_an_object_from_a_right_one() -> None:
    truth = objects((0, 0, 10, 10), labels=(0,))
    found = objects((0, 0, 10, 10), (0, 0, 10, 10), labels=(1, 0), scores=(0.9, 0.5))
    summary = summarise([Image('a.jpg', (99, 99), truth, found)], ('a', 'b'), 0.3, masks=False)
    assert dict(summary.kinds) == {'class': 1}
    assert summary.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_average_precision_of_perfect_and_of_no_detections() -> None:
    truth = objects((0, 0, 40, 40), (50, 50, 90, 90), labels=(0, 1))
    perfect = summarise([Image('a.jpg', (99, 99), truth, truth)], ('a', 'b', 'c'), 0.3, masks=False)
    assert perfect.per_class['a']['ap'] == pytest.approx(1) and perfect.per_class['b']['ap50'] == pytest.approx(1)
    assert np.isnan(perfect.per_class['c']['ap'])
    assert perfect.by_size['medium'] == pytest.approx(1) and np.isnan(perfect.by_size['large'])
    assert not perfect.kinds
    nothing = summarise([Image('a.jpg', (99, 99), truth, objects(labels=()))], ('a', 'b', 'c'), 0.3, masks=False)
    assert nothing.per_class['a']['ap'] == 0 and nothing.kinds == {'missed': 2}


def test_pixels_of_no_class_do_not_count() -> None:
    truth, found = np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 1]])
    confusion = confusion_of(truth, found, 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert intersection_over_union(confusion)[:2].tolist() == [0.5, 0.5]
    assert np.isnan(per_class(confusion, ('a', 'b', 'c'))['c']['iou'])


def test_both_evaluations_give_the_same_figures(monkeypatch) -> None:
    pytest.importorskip('faster_coco_eval')
    rng = np.random.default_rng(0)
    images = []
    for index in range(20):
        corners = rng.uniform(0, 60, (5, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(8, 40, (5, 2))], axis=1)
        labels = tuple(rng.integers(0, 2, 5).tolist())
        found = objects(*(boxes + rng.normal(0, 2, (5, 4))), labels=labels, scores=tuple(rng.uniform(0.1, 1, 5)))
        images.append(Image(f'{index}.jpg', (120, 120), objects(*boxes, labels=labels), found))
    fast = summarise(images, ('a', 'b'), 0.3, masks=False)
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    plain = summarise(images, ('a', 'b'), 0.3, masks=False)
    assert 0.1 < plain.per_class['a']['ap'] < 0.9
    for name in ('a', 'b'):
        assert fast.per_class[name] == pytest.approx(plain.per_class[name])
        assert np.allclose(fast.curves[name], plain.curves[name])
    assert fast.by_size == pytest.approx(plain.by_size, nan_ok=True)


def test_names_on_a_label_map_stand_apart_and_inside() -> None:
    """Classes in the last columns and rows, side by side: at their centres the names would be cut, and on another."""
    labels = np.zeros((320, 480), np.int64)
    for label in range(1, 6):
        labels[300 + 3 * label : 303 + 3 * label, 470:] = label
    names = ['background', 'pedestrian', 'pole', 'sign', 'pavement', 'road']
    places = NamePlaces(lambda mask: np.argwhere(mask)[len(np.argwhere(mask)) // 2][::-1], labels, names)
    for label in range(6):
        x, y = places((labels == label).astype(np.uint8))
        (width, height), baseline = cv2.getTextSize(names[label], cv2.FONT_HERSHEY_SIMPLEX, 320 / 500, 2)
        assert 0 <= x <= 480 - width - baseline and 0 <= y <= 320 - height - baseline
    covered = np.zeros_like(labels)
    for x, y, width, height in places.taken:
        covered[y : y + height, x : x + width] += 1
    assert covered.max() == 1 and len(places.taken) == 6


def test_names_of_a_segmentors_pictures_are_placed(tmp_path, segmentor, monkeypatch) -> None:
    asked = []
    placed = NamePlaces.__call__
    monkeypatch.setattr(NamePlaces, '__call__', lambda self, mask: asked.append(1) or placed(self, mask))
    assert len(browse(Config.fromfile(str(segmentor)), 'train', 1, tmp_path, show=False)) == 1
    assert asked
