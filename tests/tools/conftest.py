"""Commands as functions, and data and configs small enough to run them on."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

from mila_mm import cli
from mila_mm.datasets.shapes import write_shapes
from mila_mm.engine.config.yapf_cache import import_yapf

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'

DETECTOR = """
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(_delete_=True, type='mila_mm.MILA', arch='nano'),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=6),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=6),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20)),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.01, max_per_img=5)),
)
classes = ('circle', 'square', 'triangle', 'star', 'cross', 'ring')
load = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True)]
labels = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
data = dict(data_root=ROOT, metainfo=dict(classes=classes), serialize_data=False)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(
        **data, ann_file='annotations/instances_train.json', data_prefix=dict(img='images/training'),
        pipeline=[load[0], labels, load[1], dict(type='PackDetInputs')],
    ),
)
meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(
        **data, ann_file='annotations/instances_val.json', data_prefix=dict(img='images/validation'),
        pipeline=[*load, labels, dict(type='PackDetInputs', meta_keys=meta)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=ROOT + '/annotations/instances_val.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
"""

SEGMENTOR = """
_base_ = [
    'mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py', 'mmseg::_base_/schedules/schedule_20k.py',
]
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(_delete_=True, type='mila_mm.MILA', arch='nano'),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=16, pool_scales=(1, 2), num_classes=7),
    auxiliary_head=dict(in_channels=128, channels=8, num_classes=7),
)
classes = ('circle', 'square', 'triangle', 'star', 'cross', 'ring', 'ground')
dataset = dict(
    type='BaseSegDataset', data_root=ROOT, img_suffix='.png', reduce_zero_label=True, metainfo=dict(classes=classes),
    serialize_data=False,
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
img_ratios = [0.5, 1.0]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale_factor=r, keep_ratio=True) for r in img_ratios],
        [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
        [dict(type='LoadAnnotations')],
        [dict(type='PackSegInputs')],
    ]),
]
randomness = dict(seed=0)
"""


@pytest.fixture(scope='session', autouse=True)
def unformatted_configs() -> Iterator[None]:
    """Leave the config in logs and checkpoints as one long line: laying it out is half of a short run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_yapf(), 'FormatCode', lambda code, **_: (code, True))
        yield


@pytest.fixture(scope='session', autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: images of 64 pixels are too small to share, and threads wait long on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


def load_tool(path: str) -> ModuleType:
    """Import a script of tools/ by its path there."""
    spec = importlib.util.spec_from_file_location(f'tool_{Path(path).stem}', TOOLS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Run a script of tools/ in this process as its last two lines do, without the seconds of importing torch."""
    from mmengine.utils import ManagerMixin

    def run(path: str, *argv: object) -> Ended:
        # mmengine names loggers and visualizers by the second; a process of its own would start without any
        for kind in _subclasses(ManagerMixin):
            if '_instance_dict' in vars(kind):
                kind._instance_dict.clear()
        capfd.readouterr()
        status = cli.execute(load_tool(path).main, [str(word) for word in argv])
        return Ended(status, *capfd.readouterr())

    monkeypatch.setenv('LOCAL_RANK', '0')  # restored afterwards, where the tools set it
    return run


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*(_subclasses(inner) for inner in kind.__subclasses__()))


@pytest.fixture(scope='session')
def script() -> Callable[..., Ended]:
    """Run a script of tools/ as a user does, in a process of its own."""

    def run(path: str, *argv: object, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300) -> Ended:
        interpreter = ['bash'] if path.endswith('.sh') else [sys.executable]
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
        for name in ('PORT', 'NNODES', 'NODE_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK'):
            environment.pop(name, None)  # of this machine; two jobs on one port would collide
        done = subprocess.run(
            [*interpreter, str(TOOLS / path), *map(str, argv)],
            cwd=cwd,
            env={**environment, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope='session')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two held-out images of 64 pixels in both layouts. Not to be changed by a test."""
    return write_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=4, num_val=2, size=64, seed=0)


@pytest.fixture(scope='session')
def write_config() -> Callable[..., Path]:
    """Write a config of a nano model for a shapes folder."""

    def write(folder: Path, text: str, data: Path, more: str = '', name: str = 'config.py') -> Path:
        path = folder / name
        # mmengine reads all metafiles of a package, a second's work, for each base written as 'mmdet::'
        for package in ('mmdet', 'mmseg'):
            configs = Path(importlib.util.find_spec(package).origin).parent / '.mim' / 'configs'
            text = text.replace(f"'{package}::", f"'{configs}/")
        # _base_ must be the first thing a config says
        base, rest = text.split(']\n', 1)
        path.write_text(f'{base}]\nROOT = {str(data)!r}\n{rest}\n{dedent(more)}')
        return path

    return write


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / 'workspace'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def detector(workspace: Path, shapes: Path, write_config: Callable[..., Path]) -> Path:
    """Config of Mask R-CNN with nano, small heads and the shapes set."""
    return write_config(workspace, DETECTOR, shapes, name='detector.py')


@pytest.fixture
def segmentor(workspace: Path, shapes: Path, write_config: Callable[..., Path]) -> Path:
    """Config of UperNet with nano, small heads and the shapes set."""
    return write_config(workspace, SEGMENTOR, shapes, name='segmentor.py')


def train_once(folder: Path, text: str, data: Path, write: Callable[..., Path]) -> Path:
    """Train a config for its two iterations and return the work folder."""
    status = cli.execute(
        load_tool('train.py').main, [str(write(folder, text, data)), '--work-dir', str(folder / 'run')]
    )
    assert status == 0
    return folder / 'run'


@pytest.fixture(scope='session')
def trained_detector(tmp_path_factory: pytest.TempPathFactory, shapes: Path, write_config: Callable[..., Path]) -> Path:
    """A checkpoint of the detector after one epoch. Not to be changed by a test."""
    return train_once(tmp_path_factory.mktemp('detector'), DETECTOR, shapes, write_config) / 'epoch_1.pth'


@pytest.fixture(scope='session')
def trained_segmentor(
    tmp_path_factory: pytest.TempPathFactory, shapes: Path, write_config: Callable[..., Path]
) -> Path:
    """A checkpoint of the segmentor after two iterations. Not to be changed by a test."""
    return train_once(tmp_path_factory.mktemp('segmentor'), SEGMENTOR, shapes, write_config) / 'iter_2.pth'


def check_refused(ended: Ended, *words: str, lines: Sequence[int] = (1, 2)) -> None:
    """Check that a command ended as one does after a mistake of the user's.

    Args:
        ended: How it ended.
        words: What its message must contain.
        lines: How many lines the message may have.
    """
    assert ended.status == cli.EXIT_USER_ERROR, ended
    assert 'Traceback' not in ended.err, ended.err
    assert ended.err.startswith('error: '), ended.err
    assert len(ended.err.strip().splitlines()) in lines, ended.err
    for word in words:
        assert word in ended.err, (word, ended.err)


@pytest.fixture(scope='session')
def refused() -> Callable[..., None]:
    """The check of a command that must refuse what it was given."""
    return check_refused
