"""Pictures of predictions and curves: what is read is what was dumped, and what is drawn is there."""

import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask

from mila_mm.datasets import ADE_CLASSES, COCO_CLASSES, write_shapes
from mila_mm.datasets.shapes import FIRST_VAL_INDEX
from mila_mm.datasets.shapes_scene import draw_scene
from mila_mm.visualization import (
    Labels,
    Sample,
    read_detections,
    read_scalars,
    read_segmentations,
    save_curves,
    save_predictions,
)

SIZE = 48
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('shapes') / 'set', 1, 3, SIZE, 0)


def scene_and_path(shapes, offset):
    index = FIRST_VAL_INDEX + offset
    return draw_scene(0, index, SIZE), index, shapes / 'images' / 'validation' / f'{index:07d}.png'


def test_detections_are_read_with_their_truth(shapes, tmp_path):
    results = []
    for offset in range(3):
        scene, index, path = scene_and_path(shapes, offset)
        masks = np.stack([scene.instances == 1, scene.instances == 0])
        encoded = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks]
        instances = {
            'bboxes': torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]),
            'labels': torch.tensor([3, 4]),
            'scores': torch.tensor([0.9, 0.6]) if offset < 2 else torch.tensor([0.2, 0.1]),
            'masks': encoded,
        }
        results.append({'img_id': index, 'img_path': str(path), 'ori_shape': (SIZE, SIZE), 'pred_instances': instances})
    dump = tmp_path / 'dump.pkl'
    dump.write_bytes(pickle.dumps(results))
    samples = read_detections(dump, shapes / 'annotations' / 'instances_val.json', count=5, score_thr=0.5)
    assert len(samples) == 3
    scene = scene_and_path(shapes, 0)[0]
    first = samples[0]
    np.testing.assert_array_equal(first.image, scene.image)
    np.testing.assert_array_equal(first.truth.classes, scene.categories)
    for number, mask in enumerate(first.truth.masks, start=1):
        np.testing.assert_array_equal(mask, scene.instances == number)
        rows, columns = np.nonzero(mask)
        corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_array_equal(first.truth.boxes[number - 1], corners)
    # The surest last
    assert first.prediction.classes.tolist() == [4, 3]
    np.testing.assert_allclose(first.prediction.scores, [0.6, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(first.prediction.masks, np.stack([scene.instances == 0, scene.instances == 1]))
    assert samples[2].prediction.masks.shape == (0, SIZE, SIZE)
    assert len(read_detections(dump, shapes / 'annotations' / 'instances_val.json', count=2)) == 2


def test_segmentations_are_read_with_their_truth(shapes, tmp_path):
    results = []
    for offset in range(2):
        scene, _, path = scene_and_path(shapes, offset)
        seg_map = shapes / 'annotations' / 'validation' / path.name
        prediction = torch.full((1, SIZE, SIZE), 6)
        prediction[0, :4] = 2
        results.append({'img_path': str(path), 'seg_map_path': str(seg_map), 'pred_sem_seg': {'data': prediction}})
    dump = tmp_path / 'dump.pkl'
    dump.write_bytes(pickle.dumps(results))
    samples = read_segmentations(dump, count=2, num_drawn=len(COCO_CLASSES))
    for offset, sample in enumerate(samples):
        scene = scene_and_path(shapes, offset)[0]
        assert sample.truth.classes.tolist() == sorted(set(scene.categories))
        for mask, category in zip(sample.truth.masks, sample.truth.classes, strict=True):
            numbers = [n for n, c in enumerate(scene.categories, start=1) if c == category]
            np.testing.assert_array_equal(mask, np.isin(scene.instances, numbers))
        assert sample.prediction.classes.tolist() == [2]
        assert sample.prediction.masks.sum() == 4 * SIZE


@pytest.mark.parametrize('count', [1, 2, 3])
def test_a_mask_is_drawn_in_the_colour_of_its_class(tmp_path, count):
    image = np.full((20, 30, 3), 128, np.uint8)
    mask = np.zeros((1, 20, 30), bool)
    mask[0, 5:15, 5:25] = True
    truth = Labels(masks=mask, classes=np.array([0]))
    prediction = Labels(masks=mask, classes=np.array([1]), boxes=np.array([[5.0, 5, 25, 15]]), scores=np.array([0.75]))
    path = tmp_path / 'grid.png'
    save_predictions([Sample(image, truth, prediction)] * count, ('a', 'b'), (RED, BLUE), path, title='title')
    blue, green, red = cv2.imread(str(path)).astype(int).transpose(2, 0, 1)
    panel = (red - blue > 80) & (red - green > 80), (blue - red > 80) & (blue - green > 80)
    height, width = red.shape
    for colour, column in zip(panel, (1, 2), strict=True):
        share = np.flatnonzero(colour[: height // 2].any(axis=0)) / width
        columns = 3 * min(count, 2)
        assert share.min() >= column / columns - 0.03
        inside = share[share < 0.5] if count > 1 else share
        assert inside.max() <= (column + 1) / columns + 0.03


def test_nothing_predicted_is_drawn_too(tmp_path):
    nothing = Labels(np.zeros((0, 8, 8), bool), np.zeros(0, int), np.zeros((0, 4)), np.zeros(0))
    path = tmp_path / 'grid.png'
    save_predictions([Sample(np.zeros((8, 8, 3), np.uint8), nothing, nothing)], ADE_CLASSES, [RED] * 7, path)
    assert cv2.imread(str(path)) is not None


def drawn_lines(monkeypatch, *args):
    """The points of the lines that ``save_curves`` draws: on the left and on the right, by their labels."""
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, path: figures.append(figure))
    save_curves(*args)
    return [
        {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}
        for axes in figures[0].axes
    ]


def test_points_lie_at_their_iterations(tmp_path, monkeypatch):
    training = [
        {'loss': 3.0, 'loss_cls': 2.0, 'step': 50},
        {'loss': 2.0, 'loss_mask': 0.5, 'step': 120},
        {'loss': 1.0, 'loss_cls': 0.25, 'loss_mask': 0.125, 'step': 700},
    ]
    validation = [{'mIoU': 20.0, 'step': 300}, {'aAcc': 40.0, 'step': 450}, {'mIoU': 60.0, 'aAcc': 80.0, 'step': 700}]
    left, right = drawn_lines(monkeypatch, training, validation, {'mIoU': 'IoU', 'aAcc': 'acc'}, tmp_path / 'x.png')
    assert left == {
        'loss': [(50, 3.0), (120, 2.0), (700, 1.0)],
        'loss_cls': [(50, 2.0), (700, 0.25)],
        'loss_mask': [(120, 0.5), (700, 0.125)],
    }
    assert right == {'IoU, at the end 60': [(300, 20.0), (700, 60.0)], 'acc, at the end 80': [(450, 40.0), (700, 80.0)]}


def test_curves_show_what_the_log_holds(tmp_path):
    log = tmp_path / 'scalars.json'
    entries = [
        {'loss': 3.0, 'loss_cls': 2.0, 'lr': 0.1, 'step': 10},
        {'coco/bbox_mAP_50': 0.25, 'step': 10},
        {'loss': 1.0, 'loss_cls': 0.5, 'lr': 0.1, 'step': 20},
        {'coco/bbox_mAP_50': 0.75, 'step': 20},
    ]
    log.write_text(''.join(json.dumps(entry) + '\n' for entry in entries))
    training, validation = read_scalars(log)
    assert training == [entries[0], entries[2]]
    assert validation == [entries[1], entries[3]]
    path, without = tmp_path / 'curves.png', tmp_path / 'without.png'
    save_curves(training, validation, {'coco/bbox_mAP_50': 'box AP50', 'absent': 'absent'}, path, title='title')
    save_curves(training, [], {'coco/bbox_mAP_50': 'box AP50'}, without)
    drawn, empty = cv2.imread(str(path)), cv2.imread(str(without))
    half = drawn.shape[1] // 2
    # Colour on the right half only where there are metrics, on the left in both
    coloured = [np.ptp(p.astype(int), axis=2) > 60 for p in (drawn[:, :half], drawn[:, half:], empty[:, half:])]
    assert [c.any() for c in coloured] == [True, True, False]
    with pytest.raises(FileNotFoundError):
        read_scalars(tmp_path / 'absent.json')
