"""What is exported says in PyTorch what the model says: every family, images of two sizes in a batch."""

import pytest
import torch

from mila_mm.engine import load_config
from mila_mm.export.api import _settings, load_model
from mila_mm.export.compare import TOLERANCES, Comparison, compare
from mila_mm.export.deployed import Deployed, example_inputs
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


@pytest.mark.parametrize('name', [*DETECTORS, *SEGMENTORS, 'classifier'])
def test_the_exported_form_is_the_model(ready, name):
    made = ready(name)
    cfg = load_config(made.config)
    model, _ = load_model(cfg, made.checkpoint)
    deployed = Deployed(model, logits=name in SEGMENTORS).eval()
    comparison = Comparison()
    for batch, shape in ((1, (96, 128)), (2, (128, 96))):
        images = load_images(find_images([made.images], cfg, batch), batch, *shape)
        sizes = contents(deployed, batch, *shape)
        inputs = inputs_of(deployed, images, sizes)
        with torch.no_grad():
            results = deployed(*(torch.from_numpy(inputs[key]) for key in deployed.input_names))
        named = {key: x.numpy() for key, x in zip(deployed.output_names, results, strict=True)}
        expected = predict(model, deployed.kind, images, sizes)
        compare(deployed.kind, named, expected, sizes, TOLERANCES['fp32'], _settings(deployed), comparison)
        if name in SEGMENTORS:
            wanted = torch.from_numpy(expected[0]['logits'])
            torch.testing.assert_close(results[1][0], wanted, rtol=1e-4, atol=1e-4)
    assert not comparison.faults
    if name in DETECTORS:
        assert comparison.detections > 10
        assert (comparison.masks is not None) == ('mask' in name)
