"""The wheel outside of the repository: its commands, its configs by name."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCES = ('mila_mm', 'configs', 'model-index.yml', 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE')
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope='session')
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources, offline, by the setuptools that is installed."""
    copy, out = tmp_path_factory.mktemp('sources'), tmp_path_factory.mktemp('wheel')
    for name in SOURCES:
        if (root / name).is_dir():
            ignored = shutil.ignore_patterns('__pycache__', '*.pyc')
            shutil.copytree(root / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(root / name, copy / name)
    build = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', str(out), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob('*.whl'))


@pytest.fixture(scope='session')
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a folder of its own, beside the packages of this environment."""
    place = tmp_path_factory.mktemp('installed')
    install = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', str(place)]
    subprocess.run([*install, str(wheel)], capture_output=True, check=True)
    return place


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run a program in an empty folder, with the installed wheel."""
    environment = {
        **os.environ,
        'PYTHONPATH': str(installed),
        'OMP_NUM_THREADS': '1',
        'MILA_HOME': str(tmp_path / 'home'),
    }

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
        )

    return run


def test_it_holds_every_config(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix('mila_mm/.mim/') for name in archive.namelist() if '/.mim/' in name}
    assert packed == {'model-index.yml'} | {
        path.relative_to(root).as_posix() for path in (root / 'configs').rglob('*') if path.suffix in ('.py', '.yml')
    }


NAMES = """
import sys
import mila_mm
from mmengine.config import Config
from mmengine.hub import get_config
from mmdet.apis import DetInferencer

assert mila_mm.__file__.startswith(sys.argv[1]), mila_mm.__file__
print(get_config('mila_mm::mask_rcnn_mila_t_3x').filename.startswith(sys.argv[1]))
open('child.py', 'w').write("_base_ = 'mila_mm::demo/mask_rcnn_mila_nano_shapes.py'")
print(Config.fromfile('child.py').model.backbone.arch)
inferencer = object.__new__(DetInferencer)
inferencer.scope = 'mmdet'
cfg, weights = inferencer._load_model_from_metafile('mask_rcnn_mila_t_3x')
print(cfg.model.backbone.arch, weights)
"""


def test_names_resolve(run: Run, installed: Path) -> None:
    done = run('-c', NAMES, installed)
    assert done.returncode == 0, done.stderr
    in_the_wheel, base, named = done.stdout.splitlines()[-3:]
    assert (in_the_wheel, base) == ('True', 'nano')
    assert named.startswith('tiny https://')


def test_the_command_is_installed(installed: Path, run: Run) -> None:
    script = installed / 'bin' / 'mila'
    assert run(script, '--version').stdout.startswith('mila_mm ')
    assert '\n  train ' in run(script, '--help').stdout
    done = run(script, 'train', 'mask_rcnn_mila_t_3')
    assert (done.returncode, 'did you mean mask_rcnn_mila_t_3x' in done.stderr) == (2, True)


def test_demo(run: Run, tmp_path: Path) -> None:
    done = run('-m', 'mila_mm', 'demo', '--data-only', '--cfg-options', 'shapes.num_train=2', 'shapes.num_val=1')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'data' / 'shapes').is_dir()


def test_a_config_by_name_gets_as_far_as_its_data(run: Run) -> None:
    done = run('-m', 'mila_mm', 'train', 'mask_rcnn_mila_t_3x')
    assert done.returncode == 2
    assert 'data/coco' in done.stderr
    assert 'Traceback' not in done.stderr


WEIGHTS = """
import mila_mm, torch
from mila_mm.engine import load_config
from mmengine.registry import MODELS, init_default_scope
cfg = load_config('upernet_mila_nano_shapes')
init_default_scope('mmseg')
torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, 'weights.pth')
import cv2, numpy
cv2.imwrite('picture.png', numpy.zeros((48, 64, 3), 'uint8'))
"""


def test_predict(run: Run, tmp_path: Path) -> None:
    assert run('-c', WEIGHTS).returncode == 0
    words = ('predict', 'upernet_mila_nano_shapes', 'weights.pth', 'picture.png', '--device', 'cpu', '--masks')
    done = run('-m', 'mila_mm', *words)
    assert done.returncode == 0, done.stderr
    assert '1 image in' in done.stdout
    assert (tmp_path / 'predictions' / 'pictures' / 'picture.png').is_file()
    assert (tmp_path / 'predictions' / 'masks' / 'picture.png').is_file()


def test_swap(run: Run, tmp_path: Path) -> None:
    words = ('swap', 'mmdet::retinanet/retinanet_r50_fpn_1x_coco', '--arch', 'nano', '--out', 'swapped.py')
    done = run('-m', 'mila_mm', *words)
    assert done.returncode == 0, done.stderr
    assert "type='mila_mm.MILA'" in (tmp_path / 'swapped.py').read_text()


SHORT = """
import contextlib, io, json, os, sys
import cv2, numpy
from mila_mm.cli import command

os.mkdir('pictures'), os.mkdir('empty')
cv2.imwrite('pictures/a.png', numpy.zeros((48, 64, 3), 'uint8'))
open('pictures/b.jpg', 'w').write('no picture')
open('broken.mp4', 'wb').write(bytes(1000))
predict = 'predict upernet_mila_nano_shapes weights.pth'
ended = {}
for words in (
    'weights strip weights.pth stripped.pth',
    'run mmseg',
    'run mmdet',
    f'{predict} pictures --device cpu --masks --out folder',
    f'{predict} pictures/*.png --device cpu --out glob',
    f'{predict} broken.mp4 --device cpu',
    f'{predict} 9 --device cpu',
    f'{predict} empty --device cpu',
    'predict mask_rcnn_mila_nano_shapes weights.pth pictures/a.png --device cpu',
    'check-data upernet_mila_nano_shapes',
):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        status = command.main(words.split())
    ended[words] = status, said.getvalue()
json.dump(ended, open('ended.json', 'w'))
"""


def test_short_ones_in_one_process(run: Run, tmp_path: Path) -> None:
    assert run('-c', WEIGHTS).returncode == 0
    done = run('-c', SHORT)
    assert done.returncode == 0, done.stderr
    ended = json.loads((tmp_path / 'ended.json').read_text())
    refused = {
        ' pictures ': 'b.jpg: cannot be read as a picture; the rest is written',
        'broken.mp4': 'broken.mp4 cannot be read as a video',
        ' 9 ': 'camera 9 is not there',
        ' empty ': 'empty: no picture among 0 files',
        'mask_rcnn': 'weights.pth does not fit',
        'check-data': 'errors in config or data',
    }
    for words, (status, said) in ended.items():
        expected = [text for part, text in refused.items() if part in words]
        assert status == (2 if expected else 0), (words, said)
        assert all(text in said for text in expected), (words, said)
        assert 'Traceback' not in said, words
    assert {path.name for path in (tmp_path / 'folder/masks').iterdir()} == {'a.png'}
    assert (tmp_path / 'stripped.pth').stat().st_size
