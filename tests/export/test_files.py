"""Files: written by the command, run by onnxruntime and others, equal to the model; and without us."""

import json
import os
import shutil
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest

from mila_mm import cli
from mila_mm.cli import export as command
from mila_mm.engine import load_config
from mila_mm.export import export_model
from mila_mm.export.api import _settings, load_model
from mila_mm.export.compare import TOLERANCES, Comparison, compare
from mila_mm.export.deployed import Deployed
from mila_mm.export.formats import FORMATS
from mila_mm.export.samples import contents, find_images, inputs_of, load_images, predict

pytest.importorskip('onnxscript', reason='the extra [export] is not installed')
onnxruntime = pytest.importorskip('onnxruntime')

EXAMPLES = Path(__file__).resolve().parents[2] / 'examples' / 'deploy'
# onnxruntime and pillow, and what they need
PACKAGES = ('numpy', 'onnxruntime', 'pillow', 'coloredlogs', 'humanfriendly', 'flatbuffers', 'protobuf', 'packaging')
PACKAGES += ('sympy', 'mpmath')
DETECTORS = ['mask_rcnn', 'faster_rcnn', 'cascade_mask_rcnn', 'retinanet', 'atss', 'rtmdet', 'dino']
SEGMENTORS = ['upernet', 'segformer', 'deeplabv3plus']


@pytest.fixture(scope='session')
def detector_file(ready, tmp_path_factory):
    """Mask R-CNN as ONNX, by the command, and what that printed."""
    made = ready('mask_rcnn')
    path = tmp_path_factory.mktemp('file') / 'mask_rcnn.onnx'
    argv = [made.config, made.checkpoint, '--size', '96', '128', '--out', str(path), '--images', made.images]
    assert cli.execute(command.main, argv) == 0
    return path, made


def test_the_command_writes_a_file_that_was_compared(detector_file):
    path, _ = detector_file
    assert [x.name for x in path.parent.iterdir()] == ['mask_rcnn.onnx']
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    assert [x.name for x in session.get_inputs()] == ['image', 'size']
    assert [x.name for x in session.get_outputs()] == ['boxes', 'scores', 'labels', 'masks', 'count']
    about = json.loads(session.get_modelmeta().custom_metadata_map['mila_mm'])
    assert about['classes'][:2] == ['circle', 'square']
    assert about['size'] == [96, 128] and about['kind'] == 'detector' and about['mask_threshold'] == 0.5
    assert [x.type for x in session.get_inputs()] == ['tensor(uint8)', 'tensor(int64)']


def test_content_smaller_than_the_image_is_as_in_a_batch(detector_file):
    path, _ = detector_file
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    image = np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3), dtype=np.uint8)
    other = image.copy()
    other[:, 70:] = 0
    other[:, :, 90:] = 255
    size = np.array([[70, 90]])
    first, second = (session.run(None, {'image': x, 'size': size}) for x in (image, other))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[0][..., [0, 2]].max() <= 90 and first[0][..., [1, 3]].max() <= 70


def bare_environment(folder: Path) -> Path:
    """Make an environment with numpy, onnxruntime, pillow and what these need, linked from here; return its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    target = next(folder.glob('lib/python*/site-packages'))
    for name in PACKAGES:
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or []}:
            source = Path(str(package.locate_file(top)))
            if top not in ('..', '__pycache__') and source.exists() and not (target / top).exists():
                (target / top).symlink_to(source)
    return folder / 'bin' / 'python'


def test_the_example_runs_where_there_is_neither_torch_nor_mmengine(detector_file, tmp_path):
    path, made = detector_file
    python = bare_environment(tmp_path / 'bare')
    environment = {'PATH': os.environ['PATH'], 'OMP_NUM_THREADS': '1'}
    for name in ('torch', 'mmengine', 'mmdet', 'mila_mm', 'cv2'):
        missing = subprocess.run(
            [python, '-c', f'import {name}'], capture_output=True, env=environment, cwd=tmp_path, check=False
        )
        assert missing.returncode == 1, name
    shutil.copy(EXAMPLES / 'detect.py', tmp_path)
    picture = next(Path(made.images).glob('*.png'))
    argv = [python, 'detect.py', path, picture, 'out.png']
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split('\n')[:-1]
    assert lines and all(len(line.split()) == 6 for line in lines)
    assert (tmp_path / 'out.png').stat().st_size > 1000


def check_all_sizes(made, deployed, run, batch, precision, shapes):
    model, _ = load_model(load_config(made.config), made.checkpoint)
    found = Comparison()
    for shape in shapes:
        images = load_images(find_images([made.images], load_config(made.config), batch), batch, *shape)
        sizes = contents(deployed, batch, *shape)
        expected = predict(model, deployed.kind, images, sizes)
        named = inputs_of(deployed, images, sizes)
        compare(deployed.kind, run(named), expected, sizes, TOLERANCES[precision], _settings(deployed), found)
    assert not found.faults
    return found


@pytest.mark.slow
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('name', DETECTORS + SEGMENTORS)
def test_trained_models_at_four_sizes(trained, name, batch, tmp_path):
    made = trained(name)
    dynamic = name != 'dino'
    out = str(tmp_path / 'model.onnx')
    exported = export_model(
        made.config, made.checkpoint, size=(96, 128), dynamic=dynamic, batch=batch, out=out, images=[made.images]
    )
    assert name in SEGMENTORS or exported.comparison.detections
    model, _ = load_model(load_config(made.config), made.checkpoint)
    deployed = Deployed(model).eval()
    run = FORMATS['onnx'].load(Path(out), deployed, 1)
    shapes = [(96, 128), (160, 96), (64, 192), (128, 128)] if dynamic else [(96, 128)]
    check_all_sizes(made, deployed, run, batch, 'fp32', shapes)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mask_rcnn', 'retinanet', 'upernet'])
@pytest.mark.parametrize(
    'options',
    [
        dict(format='pt2'),
        dict(format='pt2', dynamic=True),
        dict(format='torchscript'),
        dict(format='openvino', masks='image', batch=2),
        dict(precision='fp16'),
        dict(masks='image'),
    ],
    ids=str,
)
def test_other_formats(trained, name, options, tmp_path):
    if options.get('format') == 'openvino':
        pytest.importorskip('openvino')
    made = trained(name)
    suffix = FORMATS[options.get('format', 'onnx')].suffix
    out = str(tmp_path / f'model{suffix}')
    exported = export_model(made.config, made.checkpoint, size=(96, 128), out=out, images=[made.images], **options)
    assert exported.path.stat().st_size > 10_000
    assert not exported.comparison.faults


@pytest.mark.slow
def test_a_compiled_package(trained, tmp_path):
    if shutil.which(os.environ.get('CXX', 'g++')) is None:
        pytest.skip('no compiler')
    made = trained('upernet')
    out = str(tmp_path / 'model.pt2')
    export_model(made.config, made.checkpoint, format='aoti', size=(96, 128), out=out, images=[made.images])
