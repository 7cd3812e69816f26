"""Misfits between the parts of any model are named without a step, and sound models pass."""

import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from mila_mm.engine.config.load import load_config, scope_of
from mila_mm.engine.data.rehearsal import rehearse, without_values

FASTER = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
UPERNET = 'mmseg::upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py'
YOLOX = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'


def told(name: str, *options: str, images: int = 2) -> list[str]:
    scope, _, inner = name.partition('::')
    path = Path(importlib.util.find_spec(scope).origin).parent / '.mim' / 'configs' / inner
    if not path.is_file():
        pytest.skip(f'no {name} in this version')
    cfg = load_config(name, options)
    with MODELS.switch_scope_and_registry(scope_of(cfg)) as registry:
        model = registry.build(cfg.model)
    before = torch.get_rng_state()
    found = rehearse(model, cfg.model, images)
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.device.type == 'cpu' for parameter in model.parameters())
    return [str(finding) for finding in found]


@pytest.mark.parametrize('name', [FASTER, UPERNET, YOLOX])
def test_sound_models(name) -> None:
    assert not told(name)


@pytest.mark.parametrize(
    ('name', 'option', 'words'),
    [
        (FASTER, 'model.backbone.depth=18', 'ResNet gives 64, 128, 256, 512, but model.neck.in_channels is 256'),
        (FASTER, 'model.neck.out_channels=128', 'model.rpn_head.rpn_conv takes 256 channels and is given 128'),
        (
            FASTER,
            'model.roi_head.bbox_head.in_channels=64',
            'bbox_head.shared_fcs.0 takes 3136 values a row and is given',
        ),
        (YOLOX, 'model.neck.in_channels=[64,128,256]', 'model.neck.in_channels="[96,192,384]"'),
        (UPERNET, 'model.auxiliary_head.in_channels=512', 'ResNetV1c gives 256, but model.auxiliary_head.in_channels'),
    ],
)
def test_misfits(name, option, words) -> None:
    found = told(name, option)
    assert len(found) == 1 and words in found[0], found


def test_one_value_of_a_batch_norm() -> None:
    assert 'psp_modules.0.1.bn: BatchNorm sees one value a channel' in told(UPERNET, images=1)[0]


def test_a_copy_without_values_shares_what_the_model_shares() -> None:
    layer = torch.nn.Linear(3, 3)
    twin = without_values(torch.nn.ModuleList([layer, layer]))
    assert twin[0] is twin[1] and twin[0].weight.device.type == 'meta'
