"""Models trained on photographs, as files: each says what the model says, at the size of the export and at others.

All of it takes long: ``python -m benchmarks.export_checks`` runs it and writes a table. test_files.py has a short form.
"""

import json
import os
import shutil
from dataclasses import asdict

import numpy as np
import pytest

from mila_mm.engine import load_config
from mila_mm.errors import UserError
from mila_mm.export import export_model
from mila_mm.export.api import load_model
from mila_mm.export.compare import TOLERANCES, Comparison, Tolerance, compare
from mila_mm.export.deployed import Deployed
from mila_mm.export.formats import FORMATS
from mila_mm.export.metadata import settings_of
from mila_mm.export.samples import contents, find_images, inputs_of, load_images, predict

pytest.importorskip('onnxscript', reason='the extra [export] is not installed')
pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.slow

SIZE = (96, 128)
# Portrait, landscape, three times as wide as high, the smallest with the longest
OTHERS = [(128, 96), (64, 192), (160, 96), (64, 448)]
DETECTORS = ['mask_rcnn', 'faster_rcnn', 'cascade_mask_rcnn', 'cascade_rcnn', 'retinanet', 'atss', 'rtmdet', 'dino']
FAMILIES = [*DETECTORS, 'upernet', 'segformer', 'deeplabv3plus', 'classifier']
# For what may compute in bf16
LOOSE = Tolerance(boxes=8.0, scores=0.1, masks=0.5, pixels=0.9, logits=1.0, unmatched=1.0)
# Where a graph of torch keeps that a map had more than one cell, at 1/64 and at 1/128
LEAST_OF_PT2 = dict.fromkeys(DETECTORS[:4], 96) | dict.fromkeys(('retinanet', 'atss'), 160)
# Scores that a model has only of what it was trained on; those of RTMDet start low
SURE, SURE_OF_RTMDET = 0.2, 0.05


def check(made, path, options, shapes=(), record=None):
    """Run a file at several sizes, with other photographs at each, and compare with the model."""
    cfg = load_config(made.config)
    model, _ = load_model(cfg, made.checkpoint)
    pasted, batch = options.get('masks') == 'image', options.get('batch', 1)
    deployed = Deployed(model, pasted=pasted).eval()
    run = FORMATS[options.get('format', 'onnx')].load(path, deployed, 1)
    paths = find_images([made.images], cfg, 4)
    found, best, precision = Comparison(), 0.0, options.get('precision', 'fp32')
    for number, shape in enumerate([options['size'], *shapes]):
        images = load_images(paths[number % 4 :] + paths[: number % 4], batch, *shape)
        sizes = contents(deployed, batch, *shape)
        expected = predict(model, deployed.kind, images, sizes)
        results = run(inputs_of(deployed, images, sizes))
        compare(deployed.kind, results, expected, sizes, TOLERANCES[precision], settings_of(deployed), found)
        assert not found.faults, shape
        if deployed.kind == 'detector':
            best = max(best, *(float(x['scores'].max(initial=0)) for x in expected))
        if pasted:
            assert results['masks'].shape[2:] == shape
    assert precision == 'fp16' or not found.unpaired
    least = SURE_OF_RTMDET if 'rtmdet' in made.config else SURE
    # In pictures that are much wider than the photographs little is found, and nothing sure.
    squeezed = max(options['size']) > 5 * min(options['size'])
    assert deployed.kind != 'detector' or found.detections >= (1 if squeezed else 3)
    assert deployed.kind != 'detector' or squeezed or best > least
    # Of grey a trained detector finds nothing, or next to nothing.
    grey = np.full((batch, *options['size'], 3), 127, np.uint8)
    sizes = contents(deployed, batch, *options['size'])
    results, expected = run(inputs_of(deployed, grey, sizes)), predict(model, deployed.kind, grey, sizes)
    bare = Comparison()
    compare(deployed.kind, results, expected, sizes, TOLERANCES[precision], settings_of(deployed), bare)
    assert not bare.faults
    if record is not None:  # --junitxml keeps it
        said = {'options': options, 'kind': deployed.kind, **asdict(found), 'labels': len(found.labels)}
        record('compared', json.dumps(said))
    return run, deployed


def export(made, folder, **options):
    """Export with the options' size, on the photographs; returns the path, the options and what was said of it."""
    options = {'size': SIZE, **options}
    path = folder / f'model{FORMATS[options.get("format", "onnx")].suffix}'
    exported = export_model(made.config, made.checkpoint, out=str(path), images=[made.images], **options)
    assert [x.name for x in folder.iterdir() if x.suffix != '.bin'] == [path.name]
    assert exported.kind != 'detector' or exported.comparison.detections
    assert (exported.smallest is not None) == options.get('dynamic', False)
    return path, options, exported


def refuses(run, deployed, shape, batch=1):
    """Whether a file ends in an error on images of a size, instead of in numbers."""
    images = np.zeros((batch, *shape, 3), np.uint8)
    try:
        run(inputs_of(deployed, images, np.array([shape] * batch)))
    except Exception:  # noqa: BLE001  each runtime has its own
        return True
    return False


@pytest.mark.parametrize('batch', [2, 1])
@pytest.mark.parametrize('name', FAMILIES)
def test_every_family_at_five_sizes(trained, name, batch, tmp_path, record_property):
    record_property('model', name)
    made = trained(name)
    dynamic = name != 'dino'
    path, options, exported = export(made, tmp_path, dynamic=dynamic, batch=batch)
    assert exported.smallest == (64 if dynamic else None)
    run, deployed = check(made, path, options, OTHERS if dynamic else (), record_property)
    for shape in ((100, 128), (96, 130), (33, 64), (128, 127)):
        assert refuses(run, deployed, shape, batch), shape
    assert refuses(run, deployed, SIZE, batch + 1)


@pytest.mark.parametrize('size', [(101, 131), (64, 333)], ids=str)
@pytest.mark.parametrize('name', FAMILIES)
def test_sizes_that_are_no_multiples(trained, name, size, tmp_path, record_property):
    record_property('model', name)
    made = trained(name)
    masks = 'image' if 'mask' in name else 'box'
    path, options, _ = export(made, tmp_path, size=size, masks=masks)
    run, deployed = check(made, path, options, [size] * 3, record_property)
    assert refuses(run, deployed, size[::-1]) and refuses(run, deployed, (128, 128))


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize(
    'options',
    [
        dict(format='pt2', dynamic=True, size=(160, 192)),
        dict(format='torchscript'),
        dict(format='torchscript', dynamic=True, batch=2),
        dict(format='openvino', dynamic=True),
        dict(format='openvino', masks='image', batch=2),
        dict(precision='fp16'),
        dict(format='aoti'),
        dict(format='aoti', dynamic=True, size=(160, 192)),
    ],
    ids=lambda options: '-'.join(map(str, options.values())),
)
def test_other_formats(trained, name, options, tmp_path, record_property):
    if options.get('format') == 'openvino':
        pytest.importorskip('openvino')
    if options.get('format') == 'aoti' and shutil.which(os.environ.get('CXX', 'g++')) is None:
        pytest.skip('no compiler')
    record_property('model', name)
    made = trained(name)
    options = options | ({'masks': 'box'} if 'masks' in options and 'mask' not in name else {})
    refused = options.get('format') in ('pt2', 'aoti') or options.get('dynamic') or 'precision' in options
    if name == 'dino' and refused:
        with pytest.raises(UserError, match='DINO'):
            export(made, tmp_path, **options)
        assert list(tmp_path.iterdir()) == []
        return
    path, options, exported = export(made, tmp_path, **options)
    smallest = exported.smallest or 0
    others = [shape for shape in OTHERS if min(shape) >= smallest] if smallest else ()
    run, deployed = check(made, path, options, others, record_property)
    recorded = options.get('format') in ('pt2', 'aoti')
    assert smallest <= LEAST_OF_PT2.get(name, 64) if recorded else smallest in (0, 64)
    if options.get('format') == 'aoti':  # its packages check their inputs only where the environment says so
        return
    assert all(refuses(run, deployed, (side, 192), batch=1) for side in range(64, smallest, 32))
    assert refuses(run, deployed, (100, 130)) and refuses(run, deployed, options['size'], batch=3)


@pytest.mark.parametrize('name', ['mask_rcnn', 'segformer'])
def test_what_openvinos_own_precision_changes(trained, name, tmp_path, record_property):
    openvino = pytest.importorskip('openvino')
    record_property('model', name)
    made = trained(name)
    path, _, _ = export(made, tmp_path, format='openvino')
    cfg = load_config(made.config)
    model, _ = load_model(cfg, made.checkpoint)
    deployed = Deployed(model).eval()
    images = load_images(find_images([made.images], cfg, 1), 1, *SIZE)
    sizes = contents(deployed, 1, *SIZE)
    found = Comparison()
    results = openvino.Core().compile_model(str(path), 'CPU')(inputs_of(deployed, images, sizes))
    named = {key: np.array(results[i]) for i, key in enumerate(deployed.output_names)}
    expected = predict(model, deployed.kind, images, sizes)
    compare(deployed.kind, named, expected, sizes, LOOSE, settings_of(deployed), found)
    own = {'options': {'format': 'openvino, its own precision'}, 'kind': deployed.kind, **asdict(found)}
    own['labels'] = len(found.labels)
    record_property('compared', json.dumps(own))
    if name == 'segformer':
        assert found.pixels > 0.97
    else:
        assert found.detections >= 3 and found.unpaired <= 0.2 * found.detections
