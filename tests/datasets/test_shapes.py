"""The shapes set: its labels are exact, it is the same everywhere, and a folder of it is whole or absent."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mila_mm.datasets import ADE_CLASSES, COCO_CLASSES, write_shapes
from mila_mm.datasets import shapes as shapes_module
from mila_mm.datasets.masks import encode_runs, encode_segmentation
from mila_mm.datasets.shapes_scene import draw_scene
from mila_mm.errors import UserError

NUM_TRAIN, NUM_VAL, SIZE, SEED = 24, 10, 96, 3
SPLITS = {'train': 'training', 'val': 'validation'}


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('shapes') / 'set', NUM_TRAIN, NUM_VAL, SIZE, SEED)


@pytest.fixture(scope='module', params=SPLITS)
def split(request, shapes):
    """(name of the split in ADE20K, its COCO index)"""
    coco = COCO(shapes / 'annotations' / f'instances_{request.param}.json')
    return SPLITS[request.param], coco


def digest_of_annotations(root):
    digest = hashlib.sha256()
    for path in sorted((root / 'annotations').glob('*.json')):
        digest.update(path.read_bytes())
    for path in sorted([*root.glob('annotations/*/*.png'), *root.glob('images/*/*.png')]):
        digest.update(path.name.encode() + cv2.imread(str(path), cv2.IMREAD_UNCHANGED).tobytes())
    return digest.hexdigest()


def test_coco_masks_are_the_ade_labels(shapes, split):
    name, coco = split
    for image in coco.imgs.values():
        labels = cv2.imread(str(shapes / 'annotations' / name / image['file_name']), cv2.IMREAD_UNCHANGED)
        painted = np.full_like(labels, ADE_CLASSES.index('ground') + 1)
        times = np.zeros(labels.shape, dtype=int)
        for ann in coco.imgToAnns[image['id']]:
            mask = coco.annToMask(ann).astype(bool)
            painted[mask] = ADE_CLASSES.index(COCO_CLASSES[ann['category_id'] - 1]) + 1
            times += mask
        assert times.max() == 1  # visible parts only: no pixel has two owners
        np.testing.assert_array_equal(painted, labels)


def test_areas_and_boxes_are_those_of_the_masks(split):
    _, coco = split
    for ann in coco.anns.values():
        encoded = coco.annToRLE(ann)
        assert ann['area'] == coco_mask.area(encoded)
        assert ann['bbox'] == coco_mask.toBbox(encoded).tolist()
        assert ann['iscrowd'] == 0
        assert ann['id'] > 0


def test_every_kind_of_label_occurs(shapes, split):
    name, coco = split
    anns = list(coco.anns.values())
    assert {ann['category_id'] for ann in anns} == set(range(1, len(COCO_CLASSES) + 1))
    assert any(isinstance(ann['segmentation'], dict) for ann in anns)  # a hole
    assert any(isinstance(ann['segmentation'], list) and len(ann['segmentation']) > 1 for ann in anns)  # two parts
    labels = {v for p in (shapes / 'annotations' / name).iterdir() for v in np.unique(cv2.imread(str(p), -1))}
    assert labels == set(range(1, len(ADE_CLASSES) + 1))


def test_shapes_occlude_one_another_but_stay_in_sight():
    scenes = [draw_scene(SEED, index, SIZE) for index in range(20)]
    shares = [
        (scene.instances == number).sum() / full
        for scene in scenes
        for number, full in enumerate(scene.full_areas, start=1)
    ]
    assert min(shares) >= 0.5
    assert np.mean(np.array(shares) < 0.95) > 0.1
    assert all(scene.full_areas for scene in scenes)


def test_the_top_shape_is_whole_and_drawn_as_labelled():
    scene = draw_scene(SEED, 0, SIZE)
    top = scene.instances == len(scene.categories)
    assert top.sum() == scene.full_areas[-1]
    # Ground is dull and shapes are not: the labels lie where the colour is.
    saturation = cv2.cvtColor(scene.image, cv2.COLOR_RGB2HSV)[..., 1].astype(float)
    assert saturation[scene.instances > 0].mean() > 1.5 * saturation[scene.instances == 0].mean()


def test_a_scene_is_a_function_of_seed_and_index_alone():
    first = draw_scene(5, 7, SIZE)
    np.random.seed(1)
    draw_scene(5, 8, SIZE)
    again = draw_scene(5, 7, SIZE)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.instances, again.instances)
    assert first.categories == again.categories
    assert not np.array_equal(first.image, draw_scene(5, 8, SIZE).image)
    assert not np.array_equal(first.image, draw_scene(6, 7, SIZE).image)


def test_scenes_are_those_of_every_other_machine():
    # Pixels and labels of these scenes as first drawn. Where they change on purpose, _VERSION of shapes.py rises.
    digest = hashlib.sha256()
    for index in range(4):
        scene = draw_scene(0, index, 64)
        digest.update(scene.image.tobytes() + scene.instances.tobytes() + bytes(scene.categories))
    assert digest.hexdigest() == '6f08fdee93e0008cea6962b88dd6d3bddfaf4147dbdcd4733753ea277e7dbcdb'


def test_another_process_writes_the_same(shapes, tmp_path):
    code = 'import sys; from mila_mm.datasets import write_shapes; write_shapes(sys.argv[1], *map(int, sys.argv[2:]))'
    args = [str(tmp_path / 'set'), *map(str, (NUM_TRAIN, NUM_VAL, SIZE, SEED))]
    subprocess.run([sys.executable, '-c', code, *args], check=True, cwd=Path(__file__).parents[2])
    assert digest_of_annotations(tmp_path / 'set') == digest_of_annotations(shapes)


def test_held_out_images_do_not_depend_on_the_training_set(shapes, tmp_path):
    other = write_shapes(tmp_path / 'set', 1, NUM_VAL, SIZE, SEED)
    name = 'annotations/instances_val.json'
    assert (other / name).read_bytes() == (shapes / name).read_bytes()
    train = {p.name for p in (shapes / 'images/training').iterdir()}
    assert train.isdisjoint(p.name for p in (shapes / 'images/validation').iterdir())


def test_a_whole_set_is_reused(tmp_path):
    root = write_shapes(tmp_path / 'set', 2, 1, 48, 0)
    inodes = {p: p.stat().st_ino for p in root.rglob('*')}
    assert write_shapes(root, 2, 1, 48, 0) == root
    assert {p: p.stat().st_ino for p in root.rglob('*')} == inodes
    assert [p.name for p in tmp_path.iterdir()] == ['set']


@pytest.mark.parametrize('damage', ['image', 'labels', 'annotations', 'arguments'])
def test_a_damaged_or_different_set_is_replaced(tmp_path, damage):
    root = write_shapes(tmp_path / 'set', 2, 1, 48, 0)
    whole = digest_of_annotations(root)
    if damage == 'image':
        next((root / 'images/training').iterdir()).unlink()
    elif damage == 'labels':
        next((root / 'annotations/validation').iterdir()).write_bytes(b'')
    elif damage == 'annotations':
        path = root / 'annotations/instances_train.json'
        path.write_bytes(path.read_bytes().replace(b'"iscrowd":0', b'"iscrowd":1'))
    else:
        write_shapes(root, 1, 1, 48, 0)
    assert digest_of_annotations(write_shapes(root, 2, 1, 48, 0)) == whole
    assert [p.name for p in tmp_path.iterdir()] == ['set']


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    count = 0

    def stop_at_the_third(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return draw_scene(*args)

    monkeypatch.setattr(shapes_module, 'draw_scene', stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / 'set', 4, 2, 48, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('manifest', [None, '{}', '{"generator": ', '[]'])
def test_a_folder_of_someone_else_is_left_alone(tmp_path, manifest):
    root = tmp_path / 'set'
    root.mkdir()
    (root / 'precious.txt').write_text('mine')
    if manifest is not None:
        (root / 'shapes.json').write_text(manifest)
    with pytest.raises(UserError, match='not a shapes set'):
        write_shapes(root, 1, 1, 48, 0)
    assert (root / 'precious.txt').read_text() == 'mine'


@pytest.mark.parametrize(
    'wrong', [{'num_train': 0}, {'num_val': 0}, {'size': 31}, {'seed': -1}, {'num_train': 2_000_000}, {'size': 64.5}]
)
def test_arguments_out_of_range(tmp_path, wrong):
    arguments = {'num_train': 1, 'num_val': 1, 'size': 48, 'seed': 0} | wrong
    with pytest.raises(ValueError, match=f'{next(iter(wrong))} must be a whole number from'):
        write_shapes(tmp_path / 'set', **arguments)
    assert list(tmp_path.iterdir()) == []


def decode(segmentation: list[list[float]] | dict, height: int, width: int) -> np.ndarray:
    """Return the mask, (H, W) bool, that pycocotools reads from a segmentation."""
    encoded = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(coco_mask.merge(encoded) if isinstance(encoded, list) else encoded).astype(bool)


@settings(deadline=None, max_examples=60)
@given(npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.booleans()))
def test_any_mask_survives_its_segmentation(mask):
    if not mask.any():
        with pytest.raises(ValueError, match='at least one pixel'):
            encode_segmentation(mask)
        return
    segmentation = encode_segmentation(mask)
    np.testing.assert_array_equal(decode(segmentation, *mask.shape), mask)
    np.testing.assert_array_equal(decode(encode_runs(mask), *mask.shape), mask)
    json.dumps(segmentation)
    count, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    outsides = [np.pad(parts != part, 1, constant_values=True).astype(np.uint8) for part in range(1, count)]
    # Runs only where a part has a hole: something outside the part that does not reach the border.
    has_hole = any(cv2.connectedComponents(outside, connectivity=4)[0] > 2 for outside in outsides)
    assert isinstance(segmentation, dict) == has_hole
    if isinstance(segmentation, list):
        assert len(segmentation) == count - 1


def test_mmdet_reads_it(shapes):
    from mmdet.datasets import CocoDataset
    from mmdet.utils import register_all_modules

    register_all_modules()
    dataset = CocoDataset(
        data_root=str(shapes),
        ann_file='annotations/instances_train.json',
        data_prefix={'img': 'images/training/'},
        metainfo={'classes': COCO_CLASSES},
        filter_cfg={'filter_empty_gt': True, 'min_size': 32},
        pipeline=[
            {'type': 'LoadImageFromFile'},
            {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
            {'type': 'PackDetInputs'},
        ],
    )
    assert len(dataset) == NUM_TRAIN
    for index in range(NUM_TRAIN):
        sample, scene = dataset[index], draw_scene(SEED, index, SIZE)
        np.testing.assert_array_equal(sample['inputs'].numpy(), scene.image[..., ::-1].transpose(2, 0, 1))
        truth = sample['data_samples'].gt_instances
        assert truth.labels.tolist() == list(scene.categories)
        expected = [scene.instances == number for number in range(1, len(scene.categories) + 1)]
        np.testing.assert_array_equal(truth.masks.masks.astype(bool), np.stack(expected))


def test_mmseg_reads_it(shapes):
    from mmseg.datasets import BaseSegDataset
    from mmseg.utils import register_all_modules

    register_all_modules()
    dataset = BaseSegDataset(
        data_root=str(shapes),
        data_prefix={'img_path': 'images/validation', 'seg_map_path': 'annotations/validation'},
        img_suffix='.png',
        metainfo={'classes': ADE_CLASSES},
        reduce_zero_label=True,
        pipeline=[
            {'type': 'LoadImageFromFile'},
            {'type': 'LoadAnnotations'},
            {'type': 'PackSegInputs'},
        ],
    )
    assert len(dataset) == NUM_VAL
    for offset in range(NUM_VAL):
        scene = draw_scene(SEED, shapes_module.FIRST_VAL_INDEX + offset, SIZE)
        classes = np.array([ADE_CLASSES.index('ground'), *scene.categories])
        labels = dataset[offset]['data_samples'].gt_sem_seg.data.numpy()[0]
        np.testing.assert_array_equal(labels, classes[scene.instances])
