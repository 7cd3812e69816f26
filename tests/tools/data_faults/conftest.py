"""Small sets for a test to damage, and configs for them."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mila_mm import cli
from mila_mm.engine.config.load import load_config, scope_of
from mila_mm.engine.data.check import check_everything
from mila_mm.engine.data.first_look import first_look
from mila_mm.errors import UserError


@pytest.fixture(autouse=True)
def remembered_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep results of checks out of the user's cache."""
    monkeypatch.setenv('MILA_HOME', str(tmp_path / 'home'))


@pytest.fixture(params=[True, False], ids=['first look', 'whole check'])
def look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a fault be found by the first look, and where that is left out, as in a distributed job."""
    if not request.param:
        monkeypatch.setattr(cli, 'look_first', lambda *_: None)


@pytest.fixture
def refusals() -> Callable[..., tuple[str, list[str]]]:
    """Return what the first look refuses of a config, and what the whole check; the second holds with the first."""

    def both(config: Path, stages: list[str]) -> tuple[str, list[str]]:
        refused = ''
        try:
            first_look(str(config), (), stages)
        except UserError as fault:
            refused = str(fault)
        cfg = load_config(str(config))
        whole = [str(finding) for finding in check_everything(cfg, stages, scope_of(cfg)).of('error')]
        assert whole or not refused, f'only the first look refuses: {refused}'
        return refused, whole

    return both


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the shapes set for a test to damage."""
    return Path(shutil.copytree(shapes, tmp_path / 'own'))


@pytest.fixture
def detector_of(workspace: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Write the detector's config for a data folder, with more lines."""
    text = request.getfixturevalue('detector').read_text()
    header, _, body = text.partition('ROOT = ')

    def write(data: Path, more: str = '') -> Path:
        path = workspace / 'own.py'
        path.write_text(f'{header}ROOT = {str(data)!r}\n{body.partition(chr(10))[2]}\n{more}\n')
        return path

    return write


@pytest.fixture
def segmentor_of(workspace: Path, shapes: Path, segmentor: Path) -> Callable[..., Path]:
    """Write the segmentor's config for a folder of its own: three classes, maps as they are."""

    def write(data: Path, classes: str = "('back', 'road', 'car')", more: str = '') -> Path:
        path = workspace / 'own_seg.py'
        text = segmentor.read_text().replace(str(shapes), str(data)).replace('reduce_zero_label=True, ', '')
        text = text.replace('num_classes=7', f'num_classes={len(ast.literal_eval(classes))}')
        start = text.index('classes = (')
        end = text.index('\n', start)
        splits = (
            "train_dataloader['dataset'] = dict(**dataset, data_prefix=dict(img_path='img/train', "
            "seg_map_path='ann/train'))\n"
            "val_dataloader['dataset'] = dict(**dataset, data_prefix=dict(img_path='img/val', "
            "seg_map_path='ann/val'))\n"
        )
        body = f'{text[:start]}classes = {classes}{text[end:]}'
        body = body.replace('test_dataloader = val_dataloader', f'{splits}test_dataloader = val_dataloader', 1)
        path.write_text(f'{body}\n{more}\n')
        return path

    return write


@pytest.fixture
def edit() -> Callable[..., None]:
    """Change the annotation files of a set."""

    def write(data: Path, change: Callable[[dict[str, Any]], Any], splits: tuple[str, ...] = ('train', 'val')) -> None:
        for split in splits:
            path = data / f'annotations/instances_{split}.json'
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))

    return write


@pytest.fixture
def maps() -> Callable[..., Path]:
    """Write three images and label maps a split, of values 0 to 2, changed in some splits."""

    def write(
        folder: Path, change: Callable[[np.ndarray, int], np.ndarray], splits: tuple[str, ...] = ('train', 'val')
    ) -> Path:
        rng = np.random.default_rng(0)
        for split in ('train', 'val'):
            for sub in ('img', 'ann'):
                (folder / sub / split).mkdir(parents=True)
            for number in range(3):
                labels = np.zeros((64, 64), np.uint8)
                labels[8:30, 8:50] = 1
                labels[40:60, 4:60] = 2
                cv2.imwrite(str(folder / 'img' / split / f'{number}.png'), rng.integers(0, 255, (64, 64, 3), np.uint8))
                labels = change(labels, number) if split in splits else labels
                cv2.imwrite(str(folder / 'ann' / split / f'{number}.png'), labels)
        return folder

    return write
