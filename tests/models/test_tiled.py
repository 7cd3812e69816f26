"""Tiled segmentation: mmseg's own sliding windows, without their memory."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmseg.models import EncoderDecoder
from mmseg.structures import SegDataSample

from mila_mm.models import TiledSegmentor
from mila_mm.models.tiled import tile_starts


@pytest.fixture(autouse=True)
def scope():
    DefaultScope.get_instance('tiled', scope_name='mmseg')


def segmentor(out_channels=5, tile=(40, 48), stride=(24, 32)):
    torch.manual_seed(0)
    options = dict(num_classes=out_channels)
    if out_channels == 1:
        options = dict(num_classes=2, out_channels=1, threshold=0.4)  # at 0.5 a wrong mean has the same sign
    return EncoderDecoder(
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            mean=[120.0, 110, 100],
            std=[60.0, 61, 62],
            bgr_to_rgb=True,
            pad_val=0,
            seg_pad_val=255,
        ),
        backbone=dict(
            type='mila_mm.MILA', arch=dict(embed_dim=16, depths=(1, 1), num_heads=(1, 1)), out_indices=(0, 1)
        ),
        decode_head=dict(
            type='FCNHead',
            in_channels=32,
            in_index=1,
            channels=8,
            num_convs=1,
            norm_cfg=dict(type='BN'),
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=out_channels == 1),
            **options,
        ),
        test_cfg=ConfigDict(mode='slide', crop_size=tile, stride=stride),
    ).eval()


def batch(*sizes):
    torch.manual_seed(1)
    samples = [SegDataSample(metainfo=dict(ori_shape=size, img_shape=size, pad_shape=size)) for size in sizes]
    return dict(inputs=[torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes], data_samples=samples)


@pytest.mark.parametrize(
    ('size', 'tiles', 'out_channels'),
    [
        ((40, 48), 1, 5),
        ((64, 80), 3, 5),
        ((97, 131), 3, 5),
        ((97, 131), 1, 1),
        ((33, 200), 2, 5),
        ((120, 41), 1, 5),
        ((20, 30), 1, 5),
        ((41, 49), 4, 1),
    ],
    ids=str,
)
def test_labels_are_those_of_mmseg(size, tiles, out_channels):
    model = segmentor(out_channels)
    tiled = TiledSegmentor(model, tile=(40, 48), stride=(24, 32), tiles_per_batch=tiles)
    with torch.no_grad():
        expected = model.test_step(batch(size))[0]
    sample = tiled.test_step(batch(size))[0]
    labels = sample.pred_sem_seg.data
    assert labels.shape == (1, *size) and labels.dtype == torch.uint8 and 'seg_logits' not in sample
    # Sums in another order may decide a tie otherwise.
    assert (labels != expected.pred_sem_seg.data).float().mean() < 2e-3
    assert labels.unique().numel() > 1, 'a constant map would agree with anything'


def test_several_images_of_different_sizes():
    tiled = TiledSegmentor(segmentor(), tile=(40, 48), stride=(24, 32))
    samples = tiled.val_step(batch((97, 131), (64, 80)))
    assert [tuple(s.pred_sem_seg.data.shape) for s in samples] == [(1, 97, 131), (1, 64, 80)]


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_sums_in_16_bits_change_few_labels(dtype):
    model = segmentor()
    maps = [
        TiledSegmentor(model, (40, 48), (24, 32), logits_dtype=d).test_step(batch((97, 131)))[0].pred_sem_seg.data
        for d in ('float32', dtype)
    ]
    assert (maps[0] != maps[1]).float().mean() < 0.02


@pytest.mark.parametrize(
    ('length', 'tile', 'stride', 'expected'),
    [
        (10, 10, 5, [0]),
        (3, 10, 5, [0]),
        (11, 10, 5, [0, 1]),
        (15, 10, 5, [0, 5]),
        (26, 10, 5, [0, 5, 10, 15, 16]),
        (30, 10, 10, [0, 10, 20]),
    ],
)
def test_tile_starts(length, tile, stride, expected):
    assert tile_starts(length, tile, stride) == expected


def test_an_image_that_was_resized_is_refused():
    data = batch((64, 80))
    data['data_samples'][0].set_metainfo(dict(ori_shape=(128, 160)))
    with pytest.raises(ValueError, match='take Resize and Pad out'):
        TiledSegmentor(segmentor()).test_step(data)


@pytest.mark.parametrize(
    'options',
    [dict(tile=(8, 8), stride=(9, 8)), dict(stride=(0, 8)), dict(tiles_per_batch=0), dict(logits_dtype='int8')],
    ids=str,
)
def test_refuses_what_makes_no_sense(options):
    with pytest.raises(ValueError, match='TiledSegmentor: expected'):
        TiledSegmentor(segmentor(), **options)


def test_the_device_sees_tiles_only_and_the_host_no_logits_of_the_whole_image(monkeypatch):
    tiled = TiledSegmentor(segmentor(), tile=(40, 48), stride=(40, 48), tiles_per_batch=2)
    seen = []
    original = tiled.module.encode_decode
    image = torch.zeros(3, 400, 100, dtype=torch.uint8)
    monkeypatch.setattr(tiled.module, 'encode_decode', lambda x, metas: seen.append(x.shape) or original(x, metas))
    largest = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, 'zeros', lambda *a, **k: largest.append((t := zeros(*a, **k)).numel()) or t)
    tiled.segment(image)
    assert set(seen) == {(2, 3, 40, 48), (1, 3, 40, 48)}
    assert max(largest) == 5 * 40 * 100, 'logits of one row of tiles'
