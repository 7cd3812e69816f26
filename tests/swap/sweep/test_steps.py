"""Swapped models of several families train a step and predict, on the CPU with nothing compiled."""

import math

import pytest

from mila_mm.swap.sweep.steps import StepFailed, train_and_predict

FAMILIES = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py',
    'mmseg::_base_/models/pspnet_r50-d8.py',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
]


@pytest.mark.parametrize('config', FAMILIES)
def test_one_step_and_one_prediction(config) -> None:
    step = train_and_predict(config)
    assert math.isfinite(step.loss) and step.loss > 0
    assert step.predictions == 2
    assert step.moved > 0.5, 'share of the parameters that moved'


def test_a_model_that_cannot_be_built_says_why(tmp_path) -> None:
    path = tmp_path / 'mine.py'
    path.write_text(
        "_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'\ndefault_scope = 'mmdet'\n"
        "model = dict(bbox_head=dict(loss_cls=dict(type='NoSuchLoss')))\n"
    )
    with pytest.raises(StepFailed, match='NoSuchLoss'):
        train_and_predict(str(path))
