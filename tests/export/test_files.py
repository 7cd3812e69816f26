"""Files: written by the command, run by onnxruntime and others, equal to the model; and without us."""

import json
import os
import runpy
import shutil
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mila_mm import cli
from mila_mm.cli import export as command
from mila_mm.engine import load_config
from mila_mm.export.api import load_model
from mila_mm.export.samples import find_images, load_images, predict
from mila_mm.export.two_stage import paste

pytest.importorskip('onnxscript', reason='the extra [export] is not installed')
onnxruntime = pytest.importorskip('onnxruntime')

EXAMPLES = Path(__file__).resolve().parents[2] / 'examples' / 'deploy'
# onnxruntime and pillow, and what they need
PACKAGES = ('numpy', 'onnxruntime', 'pillow', 'coloredlogs', 'humanfriendly', 'flatbuffers', 'protobuf', 'packaging')
PACKAGES += ('sympy', 'mpmath')


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


@pytest.fixture(scope='session')
def bare(tmp_path_factory):
    """A function that runs an example by a Python that has neither torch nor OpenMMLab, and returns what it prints."""
    folder = tmp_path_factory.mktemp('bare')
    python = bare_environment(folder / 'environment')
    environment = {'PATH': os.environ['PATH'], 'OMP_NUM_THREADS': '1'}

    def run(*argv):
        done = subprocess.run([python, *argv], capture_output=True, text=True, env=environment, cwd=folder, check=False)
        return done.returncode, done.stdout, done.stderr

    for name in ('torch', 'mmengine', 'mmdet', 'mmseg', 'mila_mm', 'cv2'):
        assert run('-c', f'import {name}')[0] == 1, name
    for example in EXAMPLES.glob('*.py'):
        shutil.copy(example, folder)
    return run, folder


def test_the_example_of_a_detector_runs_without_torch(detector_file, bare):
    path, made = detector_file
    run, folder = bare
    picture = next(Path(made.images).glob('*.png'))
    status, out, err = run('detect.py', path, picture, 'out.png')
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert lines and {line[0] for line in lines} <= {'circle', 'square', 'triangle', 'star', 'cross', 'ring'}
    scores = [float(line[1]) for line in lines]
    assert scores == sorted(scores, reverse=True) and min(scores) >= 0.3
    assert all(0 <= float(x) <= 96 for line in lines for x in line[2:])  # pixels of the picture, not of the file
    drawn, before = (np.asarray(Image.open(x).convert('RGB')) for x in (folder / 'out.png', picture))
    assert drawn.shape == before.shape and (drawn != before).any()


def test_masks_are_pasted_as_in_the_exported_model():
    paste_one = runpy.run_path(str(EXAMPLES / 'detect.py'))['paste']
    random = np.random.default_rng(0)
    for _ in range(5):
        mask = random.random((28, 28), np.float32)
        x, y, width, height = random.uniform((-5, -5, 3, 3), (60, 40, 60, 40))
        box = np.array([x, y, x + width, y + height], np.float32)
        wanted = paste(torch.from_numpy(mask)[None, None], torch.from_numpy(box)[None, None], (61, 83))[0, 0]
        np.testing.assert_allclose(np.asarray(paste_one(mask, box, (83, 61))), wanted.numpy(), atol=2e-4)


@pytest.fixture(scope='session')
def segmentor_file(request, ready, tmp_path_factory):
    """SegFormer as ONNX for any size, trained on photographs where they are here, else fresh."""
    try:
        made = request.getfixturevalue('trained')('segformer')
    except pytest.skip.Exception:
        made = ready('segformer')
    path = tmp_path_factory.mktemp('file') / 'segformer.onnx'
    argv = [made.config, made.checkpoint, '--size', '96', '128', '--dynamic', '--logits', '--out', str(path)]
    assert cli.execute(command.main, [*argv, '--images', made.images]) == 0
    return path, made


def test_the_example_of_a_segmentor_runs_without_torch(segmentor_file, bare):
    path, made = segmentor_file
    run, folder = bare
    picture = next(x for x in sorted(Path(made.images).iterdir()))
    status, out, err = run('segment.py', path, picture, 'labels.png')
    assert status == 0, err
    shares = [float(line.rpartition(': ')[2].removesuffix(' %')) for line in out.splitlines()]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=1)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    about = json.loads(session.get_modelmeta().custom_metadata_map['mila_mm'])
    assert {line.rpartition(': ')[0] for line in out.splitlines()} <= set(about['classes'])
    assert Image.open(folder / 'labels.png').size == Image.open(picture).size


def test_a_file_for_any_size_is_right_at_sizes_that_it_was_not_made_at(segmentor_file):
    path, made = segmentor_file
    cfg = load_config(made.config)
    model, _ = load_model(cfg, made.checkpoint)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    paths = find_images([made.images], cfg, 4)
    for number, shape in enumerate([(96, 128), (128, 96), (64, 192), (160, 96), (64, 448)]):
        images = load_images(paths[number % 4 :], 1, *shape)
        (wanted,) = predict(model, 'segmentor', images, np.array([shape]))
        labels, logits = session.run(['labels', 'logits'], {'image': images})
        assert (labels[0] == wanted['labels']).mean() > 0.999, shape
        # A fresh model gives all pixels one label, whatever it sees.
        assert abs(logits[0] - wanted['logits']).max() < 1e-3 * abs(wanted['logits']).max(), shape
    for shape in ((100, 128), (96, 130), (33, 64), (128, 127)):
        with pytest.raises(Exception, match='Reshape'):
            session.run(None, {'image': np.zeros((1, *shape, 3), np.uint8)})
