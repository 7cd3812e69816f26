"""Files: written by the command, run by onnxruntime and others, equal to the model; and without us."""

import json
import os
import runpy
import shutil
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

import cv2
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
onnx = pytest.importorskip('onnx')

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


@pytest.fixture
def example(tmp_path, capsys):
    """Run an example on a picture with a file of given nodes; return the lines that it prints, and what it draws."""

    def run(name, picture, nodes, outputs, **about):
        types = onnx.TensorProto
        inputs = [
            onnx.helper.make_tensor_value_info('image', types.UINT8, [1, None, None, 3]),
            onnx.helper.make_tensor_value_info('size', types.INT64, [1, 2]),
        ]
        results = [onnx.helper.make_tensor_value_info(x, getattr(types, kind), None) for x, kind in outputs.items()]
        graph = onnx.helper.make_graph(nodes, 'made', inputs[: 1 if name == 'segment.py' else 2], results)
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 18)], ir_version=8)
        onnx.helper.set_model_props(model, {'mila_mm': json.dumps({'batch': 1, 'classes': None, **about})})
        onnx.save(model, tmp_path / 'made.onnx')
        picture.save(tmp_path / 'picture.png')
        paths = (str(tmp_path / x) for x in ('made.onnx', 'picture.png', 'out.png'))
        runpy.run_path(str(EXAMPLES / name))['main'](*paths)
        return capsys.readouterr().out.splitlines(), np.asarray(Image.open(tmp_path / 'out.png'))

    return run


def found(box, **masks):
    """The nodes of a detector that finds one object, whatever it is given, and their types."""
    results = dict(boxes=np.array([[box]], np.float32), scores=np.array([[0.9]], np.float32), labels=np.array([[3]]))
    results |= {**masks, 'count': np.array([1])}
    values = {name: onnx.numpy_helper.from_array(x) for name, x in results.items()}
    nodes = [onnx.helper.make_node('Constant', [], [name], value=x) for name, x in values.items()]
    return nodes, {name: onnx.TensorProto.DataType.Name(x.data_type) for name, x in values.items()}


@pytest.mark.parametrize('any_multiple_of', [None, 32])
def test_boxes_are_scaled_back_along_each_axis(example, any_multiple_of):
    about = dict(size=[96, 128], any_multiple_of=any_multiple_of, smallest_side=64)
    lines, _ = example('detect.py', Image.new('RGB', (1000, 100)), *found([0, 0, 128, 13]), **about)
    assert lines == ['3 0.900 0.0 0.0 1000.0 100.0']  # 12.8 rows are 13 in the file's input
    lines, _ = example('detect.py', Image.new('RGB', (100, 1500)), *found([3, 48, 6, 96]), **about)
    assert lines == ['3 0.900 50.0 750.0 100.0 1500.0']


def test_masks_of_the_whole_image_are_laid_over_the_picture(example):
    mask = np.zeros((1, 1, 64, 64), bool)
    mask[..., :32] = mask[..., 43:, :] = True  # the left half, and what lies below the content
    about = dict(size=[64, 64], any_multiple_of=None, smallest_side=None, mask_threshold=0.5)
    _, drawn = example('detect.py', Image.new('RGB', (60, 40)), *found([40, 2, 50, 9], masks=mask), **about)
    wanted = np.zeros((40, 60), bool)
    wanted[:, :30] = True
    np.testing.assert_array_equal(drawn.any(-1), wanted)


@pytest.mark.parametrize(
    ('picture', 'size', 'wanted'),
    [
        ((20000, 300), (512, 512), {64, 2048}),
        ((300, 20000), (512, 512), {64, 2048}),
        ((1000, 300), (512, 512), {512, 1696}),
        ((8000, 1000), (512, 3072), {384, 3072}),  # the file itself was made at more
        ((640, 480), (96, 128), {96, 128}),
    ],
)
def test_a_long_picture_does_not_become_a_larger_one(example, picture, size, wanted):
    sides = [  # one row of two labels: the height and the width of the input
        onnx.helper.make_node('Shape', ['image'], ['sides'], start=1, end=3),
        onnx.helper.make_node('Constant', [], ['axes'], value_ints=[0, 1]),
        onnx.helper.make_node('Unsqueeze', ['sides', 'axes'], ['labels']),
    ]
    about = dict(size=list(size), any_multiple_of=32, smallest_side=64)
    lines, drawn = example('segment.py', Image.new('RGB', picture), sides, {'labels': 'INT64'}, **about)
    assert set(lines) == {f'{side}: 50.0 %' for side in wanted}
    assert drawn.shape == (*picture[::-1], 3)


@pytest.mark.parametrize('name', ['detect.py', 'segment.py'])
def test_pictures_are_read_as_in_training(name, tmp_path):
    read = runpy.run_path(str(EXAMPLES / name))['read']
    random = np.random.default_rng(0)
    grey, colour = random.integers(0, 65536, (30, 40), np.uint16), random.integers(0, 256, (30, 40, 4), np.uint8)
    cv2.imwrite(str(tmp_path / '16.png'), grey)
    cv2.imwrite(str(tmp_path / '16.tif'), grey)
    cv2.imwrite(str(tmp_path / '16.pgm'), grey)
    cv2.imwrite(str(tmp_path / '48.png'), random.integers(0, 65536, (30, 40, 3), np.uint16))
    turned = Image.Exif()
    turned[274] = 6
    picture = Image.fromarray(colour)
    picture.save(tmp_path / 'rgba.png')
    picture.convert('L').save(tmp_path / '8.png')
    picture.convert('RGB').quantize(16).save(tmp_path / 'palette.png')
    picture.convert('RGB').save(tmp_path / 'turned.jpg', exif=turned)
    for path in sorted(tmp_path.iterdir()):
        wanted = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB).astype(int)
        got = read(str(path))
        assert got.mode == 'RGB' and got.size == ((30, 40) if path.stem == 'turned' else (40, 30)), path
        np.testing.assert_allclose(np.asarray(got), wanted, atol=3 if path.suffix == '.jpg' else 0, err_msg=path.name)


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
