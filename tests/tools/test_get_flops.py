"""tools/analysis_tools/get_flops.py: the published figures, and what is counted."""

import json

import numpy as np
import pytest
import torch

from mila_mm.engine.complexity import DEFAULT_SHAPES

TOOL = 'analysis_tools/get_flops.py'


def count(command, config, *argv: object) -> dict:
    ended = command(TOOL, config, '--json', *argv)
    assert ended.status == 0, ended.err
    return json.loads(ended.out.splitlines()[-1])


def test_detectors_as_published(command, root, workspace) -> None:
    # A quarter of the published 1280 x 800: all but the head of the 1000 proposals is proportional to the image. That
    # head is the same for every size of the backbone and counted once.
    quarter = ['--shape', 320, 800]
    counts = {'t': count(command, root / 'configs/mask_rcnn_mila_t_1x.py', *quarter)}
    roi_head = counts['t']['parts']['roi_head'][0]
    for size, schedule in (('s', '3x'), ('b', '1x')):
        option = 'model.test_cfg.rpn.max_per_img=1'
        config = root / f'configs/mask_rcnn_mila_{size}_{schedule}.py'
        counts[size] = count(command, config, *quarter, '--cfg-options', option)
    for size, macs, params in (('t', 255e9, 44e6), ('s', 319e9, 63e6), ('b', 502e9, 115e6)):
        dense = sum(part_macs for name, (part_macs, _) in counts[size]['parts'].items() if name != 'roi_head')
        assert 4 * dense + roi_head == pytest.approx(macs, rel=0.01)
        assert counts[size]['params'] == pytest.approx(params, rel=0.01)


def test_segmentor_as_published(command, root, workspace) -> None:
    # a sixteenth of the published 2048 x 512
    part = count(command, root / 'configs/upernet_mila_b_160k.py', '--shape', 256)
    assert 16 * part['macs'] == pytest.approx(1183e9, rel=0.01)
    assert part['params'] == pytest.approx(128e6, rel=0.01)


def test_sizes_of_the_paper_are_the_defaults() -> None:
    """Height and width of the published costs: 1280 x 800 and 512 x 2048 as papers write them; 224 of classifiers."""
    assert DEFAULT_SHAPES == {'mmdet': (800, 1280), 'mmseg': (512, 2048), 'mmpretrain': (224, 224)}


def test_attention_is_counted(command, detector) -> None:
    one_block = ['model.backbone.arch.embed_dim=32', 'model.backbone.arch.num_heads=[1]']
    detector.write_text(
        detector.read_text()
        .replace("arch='nano'", 'arch=dict(), out_indices=(0,)')
        .replace('in_channels=[32, 64, 128, 256], out_channels=16', 'in_channels=[32], out_channels=16')
    )
    options = ['--shape', 64, 64, '--cfg-options', *one_block]
    shallow, deep = (count(command, detector, *options, f'model.backbone.arch.depths=[{depth}]') for depth in (1, 2))
    tokens, width, head = 16 * 16, 32, 32
    linear = 13 * width * width  # in, out, act, qk (2), MLP (8)
    depthwise = 4 * 9 * width  # cpe1, dwc, lepe, cpe2
    products = 2 * width * head  # k^T v and q (k^T v) per head
    normaliser = width
    expected = tokens * (linear + depthwise + products + normaliser)
    found = deep['parts']['backbone'][0] - shallow['parts']['backbone'][0]
    # norms are counted as well, a few operations per channel
    assert expected - tokens * normaliser <= found <= expected + tokens * 16 * width


def test_size_and_wording(command, detector) -> None:
    ended = command(TOOL, detector, '--shape', 60)
    assert ended.status == 0
    assert '60 x 60 (height x width), padded to 64 x 64' in ended.out
    macs = float(ended.out.split('\nMACs:')[1].split()[0])
    flops = float(ended.out.split('\nFLOPs:')[1].split()[0])
    assert flops == pytest.approx(2 * macs, abs=0.2)


def test_training_only_parts_are_marked(command, segmentor) -> None:
    ended = command(TOOL, segmentor, '--shape', 64)
    lines = [line for line in ended.out.splitlines() if 'training only' in line]
    assert len(lines) == 1
    assert 'auxiliary_head' in lines[0]


def test_needs_neither_weights_nor_data(command, detector) -> None:
    options = ['model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=nowhere.pth']
    options.append('train_dataloader.dataset.data_root=nowhere')
    assert command(TOOL, detector, '--shape', 64, '--cfg-options', *options).status == 0


def test_does_not_depend_on_chance(command, detector) -> None:
    counts = []
    for seed in (1, 2):  # other weights and another image, were they not fixed: other proposals
        torch.manual_seed(seed)
        np.random.seed(seed)
        counts.append(count(command, detector, '--shape', 64))
    assert counts[0] == counts[1]
