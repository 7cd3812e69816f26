"""Predictions, and what is written of them."""

import json
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mila_mm.engine import Predictor, load_config, predict
from mila_mm.engine.inference import drawing
from mila_mm.engine.inference.outputs import Outputs
from mila_mm.errors import UserError

DETECTOR, SEGMENTOR = 'mask_rcnn_mila_nano_shapes', 'upernet_mila_nano_shapes'
EVERYTHING = dict(score_thr=0.0, write_json=True, masks=True, device='cpu')


def test_detector_on_a_folder(folder: Path, weights, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    summary = predict(DETECTOR, str(weights(DETECTOR)), str(folder), out=str(out), batch=2, **EVERYTHING)
    assert summary.images == 3
    assert [line.partition(': ')[0] for line in summary.failures] == [str(folder / 'broken.jpg')]
    assert sorted(path.name for path in (out / 'pictures').iterdir()) == ['a.jpg', 'b.png', 'c.bmp']
    assert cv2.imread(str(out / 'pictures' / 'b.png')).shape == (40, 56, 3)

    from pycocotools.coco import COCO

    coco = COCO(str(out / 'predictions.json'))
    assert len(coco.anns) == summary.found > 0
    assert [image['file_name'] for image in coco.dataset['images']] == ['a.jpg', 'b.png', 'c.bmp']
    assert [category['name'] for category in coco.dataset['categories']][:2] == ['circle', 'square']
    second = [each for each in coco.dataset['annotations'] if each['image_id'] == 2]
    numbers = cv2.imread(str(out / 'masks' / 'b.png'), cv2.IMREAD_UNCHANGED)
    assert numbers.shape == (40, 56)
    top = coco.annToMask(second[0])
    assert np.array_equal(numbers == 1, top.astype(bool))
    assert numbers.max() <= len(second)
    assert all(-1 <= each['bbox'][0] <= 57 and each['bbox'][2] >= 0 for each in second)


def test_results_are_those_of_the_inferencer_of_mmdet(folder: Path, weights) -> None:
    from mmdet.apis import DetInferencer

    path = weights(DETECTOR)
    ours = Predictor(DETECTOR, str(path), device='cpu')([folder / 'a.jpg', folder / 'b.png'])
    theirs = DetInferencer(load_config(DETECTOR), str(path), device='cpu')
    expected = theirs([str(folder / 'a.jpg'), str(folder / 'b.png')], return_datasamples=True, no_save_vis=True)
    for one, other in zip(ours, expected['predictions'], strict=True):
        assert torch.allclose(one.pred_instances.bboxes, other.pred_instances.bboxes.cpu(), atol=1e-3)
        assert torch.equal(one.pred_instances.labels, other.pred_instances.labels.cpu())


def test_segmentor_on_pictures_of_several_sizes(folder: Path, weights, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    summary = predict(SEGMENTOR, str(weights(SEGMENTOR)), str(folder), out=str(out), batch=3, **EVERYTHING)
    assert (summary.images, summary.found) == (3, 0)
    labels = cv2.imread(str(out / 'masks' / 'b.png'), cv2.IMREAD_UNCHANGED)
    alone = Predictor(SEGMENTOR, str(weights(SEGMENTOR)), device='cpu')([folder / 'b.png'])[0]
    assert 'seg_logits' not in alone
    assert np.array_equal(labels, alone.pred_sem_seg.data[0].numpy())
    content = json.loads((out / 'predictions.json').read_text())
    assert sum(each['area'] for each in content['annotations'] if each['image_id'] == 2) == 40 * 56
    assert cv2.imread(str(out / 'pictures' / 'c.bmp')).shape == (48, 64, 3)


def test_video(video: Path, weights, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    summary = predict(DETECTOR, str(weights(DETECTOR)), str(video), out=str(out), limit=5, device='cpu', batch=2)
    assert (summary.images, summary.failures) == (5, [])
    capture = cv2.VideoCapture(str(out / 'clip.mp4'))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 5
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert capture.read()[1].shape == (48, 64, 3)


def interrupt(images, source):
    for index, picture in enumerate(images):
        if index == 3:
            raise KeyboardInterrupt
        yield picture


@pytest.mark.parametrize('end', ['Ctrl-C', 'the file breaks off'])
def test_what_was_done_before_a_break_is_kept(end: str, video: Path, weights, tmp_path: Path) -> None:
    progress = interrupt if end == 'Ctrl-C' else None
    if end != 'Ctrl-C':
        video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    out, path = tmp_path / 'out', str(weights(DETECTOR))
    summary = predict(DETECTOR, path, str(video), out=str(out), write_json=True, device='cpu', progress=progress)
    assert summary.interrupted == (end == 'Ctrl-C')
    assert len(summary.failures) == (end != 'Ctrl-C')
    assert summary.images >= 3
    assert len(json.loads((out / 'predictions.json').read_text())['images']) == summary.images
    assert int(cv2.VideoCapture(str(out / 'clip.mp4')).get(cv2.CAP_PROP_FRAME_COUNT)) == summary.images


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize('moment', ['in the model', 'while a frame is drawn', 'while the video is finished'])
def test_a_signal_at_any_moment_leaves_whole_files(
    moment: str, signum: int, video: Path, weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name = {
        'in the model': (Predictor, '__call__'),
        'while a frame is drawn': (Predictor, 'draw'),
        'while the video is finished': (Outputs, 'close'),
    }[moment]
    calls, original = [], getattr(place, name)

    def send(*args):
        calls.append(args)
        if len(calls) == (1 if name == 'close' else 3):
            signal.raise_signal(signum)
        return original(*args)

    monkeypatch.setattr(place, name, send)
    # A shell's background jobs ignore SIGINT, and predict leaves what is ignored alone.
    before, out = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL, tmp_path / 'out'
    inherited = signal.signal(signum, before)
    options = dict(out=str(out), write_json=True, device='cpu', batch=1)
    try:
        summary = predict(DETECTOR, str(weights(DETECTOR)), str(video), **options)
        assert signal.getsignal(signum) is before
    finally:
        signal.signal(signum, inherited)
    images = {'in the model': 2, 'while a frame is drawn': 3, 'while the video is finished': 8}[moment]
    assert (summary.images, summary.interrupted, summary.signum) == (images, True, signum)
    assert len(json.loads((out / 'predictions.json').read_text())['images']) == images
    assert int(cv2.VideoCapture(str(out / 'clip.mp4')).get(cv2.CAP_PROP_FRAME_COUNT)) == images


PANOPTIC = """
_base_ = 'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='mila_mm.MILA', arch='nano'), neck=dict(in_channels=[32, 64, 128, 256]),
    panoptic_fusion_head=dict(), test_cfg=dict(rcnn=dict(score_thr=0.0, max_per_img=5)),
)
test_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 48), keep_ratio=True),
    dict(type='LoadPanopticAnnotations'), dict(type='PackDetInputs'),
]))
"""


def test_panoptic(folder: Path, weights, tmp_path: Path) -> None:
    config, out = tmp_path / 'panoptic.py', tmp_path / 'out'
    config.write_text(PANOPTIC)
    path = weights(str(config))
    summary = predict(str(config), str(path), str(folder / 'a.jpg'), out=str(out), write_json=True, device='cpu')
    assert summary.images == 1
    content = json.loads((out / 'predictions.json').read_text())
    entry = content['annotations'][0]
    blue, green, red = np.moveaxis(cv2.imread(str(out / 'masks' / entry['file_name'])).astype(int), -1, 0)
    ids = red + 256 * green + 65536 * blue
    assert {segment['id']: segment['area'] for segment in entry['segments_info']} == {
        int(value): int((ids == value).sum()) for value in np.unique(ids) if (value - 1) % 1000 < 133
    }


def test_checkpoint_of_another_model(folder: Path, weights) -> None:
    with pytest.raises(UserError, match='does not fit'):
        Predictor(DETECTOR, str(weights(SEGMENTOR)), device='cpu')


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(device='cuda:77'), r'--device cuda:77 cannot be used'),
        (dict(device='nonsense'), r'--device nonsense cannot be used'),
        (dict(batch=0), r'--batch: expected a number above 0'),
    ],
)
def test_wrong_options(options: dict, said: str, folder: Path, weights) -> None:
    with pytest.raises(UserError, match=said):
        predict(DETECTOR, str(weights(DETECTOR)), str(folder), **{'device': 'cpu', **options})


def test_a_picture_is_never_drawn_over(folder: Path, weights, tmp_path: Path) -> None:
    before = (folder / 'a.jpg').read_bytes()
    with pytest.raises(UserError, match='would replace the picture'):
        predict(DETECTOR, str(weights(DETECTOR)), str(folder), out=str(tmp_path), device='cpu')
    assert (folder / 'a.jpg').read_bytes() == before


@pytest.mark.skipif(not drawing.has_supervision(), reason='supervision is not installed')
def test_both_ways_of_drawing_draw(folder: Path, weights, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(weights(DETECTOR))
    fast = Predictor(DETECTOR, path, device='cpu')
    monkeypatch.setattr('mila_mm.engine.inference.predictor.has_supervision', lambda: False)
    slow = Predictor(DETECTOR, path, device='cpu')
    image = np.full((96, 96, 3), 255, np.uint8)
    sample = fast([image])[0]
    for predictor in (fast, slow):
        drawn = predictor.draw(image, sample, score_thr=0.0)
        assert drawn.shape == image.shape
        assert (drawn != 255).any(axis=-1).mean() > 0.02
        assert np.array_equal(predictor.draw(image, sample, score_thr=1.1), image)
    assert len(drawing.detections(sample, 0.0)) == len(sample.pred_instances)
