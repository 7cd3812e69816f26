"""What is exported says in PyTorch what the model says: every family, images of two sizes in a batch."""

import pytest
import torch

from mila_mm.engine import load_config
from mila_mm.export.api import load_model
from mila_mm.export.compare import TOLERANCES, Comparison, compare
from mila_mm.export.deployed import Deployed, example_inputs
from mila_mm.export.metadata import settings_of
from mila_mm.export.samples import contents, find_images, inputs_of, load_images, predict

DETECTORS = ['mask_rcnn', 'faster_rcnn', 'cascade_mask_rcnn', 'cascade_rcnn', 'retinanet', 'atss', 'rtmdet', 'dino']
SEGMENTORS = ['upernet', 'segformer', 'deeplabv3plus']


@pytest.mark.parametrize('name', ['mask_rcnn', 'cascade_rcnn', 'rtmdet'])
def test_nothing_is_found(ready, name):
    made = ready(name)
    key = 'score_thr' if name == 'rtmdet' else 'rcnn.score_thr'
    model, _ = load_model(load_config(made.config, [f'model.test_cfg.{key}=1.0']), made.checkpoint)
    deployed = Deployed(model).eval()
    with torch.no_grad():
        results = deployed(*example_inputs(deployed, 2, 96, 128))
    named = dict(zip(deployed.output_names, results, strict=True))
    assert named['count'].tolist() == [0, 0] and (named['labels'] == -1).all()
    assert all((named[key] == 0).all() for key in named if key != 'labels')


def compared(model, config, images, logits=False):
    """Compare a model with its exported form: one image alone, and two of different sizes in a batch."""
    deployed, cfg = Deployed(model, logits=logits).eval(), load_config(config)
    comparison = Comparison()
    for batch, shape in ((1, (96, 128)), (2, (128, 96))):
        pictures = load_images(find_images([str(images)], cfg, batch), batch, *shape)
        sizes = contents(deployed, batch, *shape)
        inputs = inputs_of(deployed, pictures, sizes)
        with torch.no_grad():
            results = deployed(*(torch.from_numpy(inputs[key]) for key in deployed.input_names))
        named = {key: x.numpy() for key, x in zip(deployed.output_names, results, strict=True)}
        expected = predict(model, deployed.kind, pictures, sizes)
        compare(deployed.kind, named, expected, sizes, TOLERANCES['fp32'], settings_of(deployed), comparison)
    assert not comparison.faults and not comparison.unpaired
    return comparison


@pytest.mark.parametrize('name', [*DETECTORS, *SEGMENTORS, 'classifier'])
def test_the_exported_form_is_the_model(ready, name):
    made = ready(name)
    model, _ = load_model(load_config(made.config), made.checkpoint)
    comparison = compared(model, made.config, made.images, logits=name in SEGMENTORS)
    if name in DETECTORS:
        assert comparison.detections > 10
        assert (comparison.masks is not None) == ('mask' in name)
    if name in SEGMENTORS:
        assert comparison.logits < 1e-4


ONE_CHANNEL = ['model.decode_head.num_classes=2', 'model.decode_head.out_channels=1', 'model.auxiliary_head=None']
SOFTMAX = 'model.bbox_head.loss_cls={"_delete_":True,"type":"CrossEntropyLoss"}'


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('fcos', []),
        ('mask_rcnn', ['model.roi_head.bbox_head.reg_class_agnostic=True']),
        ('mask_rcnn', ['model.roi_head.mask_head.class_agnostic=True']),
        ('mask_rcnn', ['model.roi_head.bbox_head.num_classes=1', 'model.roi_head.mask_head.num_classes=1']),
        ('mask_rcnn', ['model.test_cfg.rcnn.max_per_img=3', 'model.test_cfg.rcnn.score_thr=0.0']),
        ('mask_rcnn', ['model.test_cfg.rcnn.mask_thr_binary=0.3', 'model.test_cfg.rcnn.nms.class_agnostic=True']),
        ('faster_rcnn', ['model.rpn_head.loss_cls.use_sigmoid=False', 'model.test_cfg.rpn.min_bbox_size=8']),
        ('retinanet', ['model.bbox_head.num_classes=1']),
        ('retinanet', [SOFTMAX]),
        ('retinanet', [SOFTMAX, 'model.bbox_head.num_classes=1']),
        ('retinanet', ['model.test_cfg.max_per_img=2', 'model.test_cfg.min_bbox_size=20']),
        ('atss', ['model.bbox_head.num_classes=1', 'model.test_cfg.nms_pre=5']),
        ('dino', ['model.bbox_head.num_classes=1', 'model.test_cfg.max_per_img=7']),
        ('segformer', ONE_CHANNEL[:2]),
        ('segformer', [*ONE_CHANNEL[:2], 'model.decode_head.threshold=0.0']),
        ('upernet', [*ONE_CHANNEL, 'model.decode_head.threshold=0.6']),
        ('segformer', ['model.decode_head.num_classes=300']),
        ('upernet', ['model.decode_head.align_corners=True']),
    ],
    ids=lambda x: '-'.join(y.rpartition('.')[2] for y in x) if isinstance(x, list) else x,
)
def test_other_settings_are_stated_too(fresh, shapes, name, options):
    config, model = fresh(name, *options)
    comparison = compared(model, config, shapes / 'images' / 'training', logits=name in SEGMENTORS)
    assert name in SEGMENTORS or comparison.detections >= 5
