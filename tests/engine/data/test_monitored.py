"""Figures that hooks and schedules wait for."""

import pytest
from mmengine.config import Config

from mila_mm.engine.data.ignored import check_ignored
from mila_mm.engine.data.monitored import check_monitored

COCO = dict(type='CocoMetric', metric=['bbox', 'segm'])
IOU = dict(type='IoUMetric', iou_metrics=['mDice'])


def told(metric, *, save_best=None, **more) -> list[str]:
    cfg = dict(val_evaluator=metric, default_hooks=dict(checkpoint=dict(save_best=save_best)), **more)
    return [str(finding) for finding in check_monitored(Config(cfg))]


@pytest.mark.parametrize(
    ('metric', 'name'),
    [
        (COCO, 'coco/segm_mAP_50'),
        (COCO, 'auto'),
        (COCO, ['coco/bbox_mAP', 'coco/segm_mAP']),
        (COCO, 'segm_mAP'),
        (dict(COCO, prefix='own'), 'own/bbox_mAP'),
        (dict(COCO, classwise=True), 'coco/cat_precision'),
        (dict(COCO, metric='proposal'), 'coco/AR@100'),
        (IOU, 'mDice'),
        (dict(type='VOCMetric'), 'anything'),
        ([COCO, dict(type='VOCMetric')], 'anything'),
        (COCO, None),
    ],
)
def test_known_and_unknown_names_pass(metric, name) -> None:
    assert not told(metric, save_best=name)


@pytest.mark.parametrize(
    ('metric', 'name', 'words'),
    [
        (COCO, 'coco/mAP', "nearest: 'coco/bbox_mAP'"),
        (COCO, ['coco/bbox_mAP', 'coco_segm_mAP'], "waits for 'coco_segm_mAP'"),
        (COCO, 'mAP', "waits for 'mAP'"),
        ([COCO, dict(COCO, prefix='own')], 'bbox_mAP', "waits for 'bbox_mAP'"),
        (dict(COCO, metric='bbox'), 'coco/segm_mAP', 'which the validation does not give'),
        (IOU, 'mIoU', "'mDice'"),
    ],
)
def test_other_names_are_told(metric, name, words) -> None:
    found = told(metric, save_best=name)
    assert len(found) == 1 and words in found[0], found


def test_hooks_and_schedules() -> None:
    hooks = [dict(type='EarlyStoppingHook', monitor='coco/AP')]
    schedule = [dict(type='ReduceOnPlateauLR', monitor='coco/AP'), dict(type='ReduceOnPlateauLR', monitor='loss')]
    found = told(COCO, custom_hooks=hooks, param_scheduler=schedule)
    assert [line.partition(':')[0] for line in found] == ['custom_hooks.0.monitor', 'param_scheduler.0.monitor']


@pytest.mark.parametrize(
    ('heads', 'padded', 'words'),
    [
        ((255, 255), 255, None),
        ((0, 0), 0, None),
        ((200, 255), 255, 'auxiliary_head.ignore_index: is 255, but model.decode_head ignores 200'),
        ((0, 0), 255, 'seg_pad_val: is 255'),
    ],
)
def test_ignored_labels(heads, padded, words) -> None:
    model = dict(
        data_preprocessor=dict(size=(8, 8), seg_pad_val=padded),
        decode_head=dict(ignore_index=heads[0]),
        auxiliary_head=dict(ignore_index=heads[1]),
    )
    found = [str(finding) for finding in check_ignored(Config(dict(model=model)))]
    assert len(found) == (words is not None)
    assert all(words in line for line in found)


def test_a_class_that_only_the_metric_ignores() -> None:
    metric = dict(type='IoUMetric', ignore_index=0)
    cfg = Config(dict(model=dict(decode_head=dict()), val_evaluator=metric))
    assert [str(finding) for finding in check_ignored(cfg, ('road',))] == [
        "val_evaluator.ignore_index: is 0, the label of 'road': that class is learnt, and its pixels are not judged"
    ]


def test_an_ignored_class() -> None:
    cfg = Config(dict(model=dict(decode_head=dict(ignore_index=1))))
    assert not check_ignored(cfg, ('road',))
    found = check_ignored(cfg, ('road', 'car'))
    assert [str(finding) for finding in found] == [
        "model.decode_head.ignore_index: is 1, the label of 'car': that class is never learnt"
    ]
