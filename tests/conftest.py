"""Fixtures shared by all rooms."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mila_mm  # noqa: F401 - before any test imports mmdet, which looks for mmcv's ops once

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_DATA = Path(os.environ.get('MILA_MM_SAMPLE_DATA', ROOT.parent / 'shared' / 'data'))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
    if not os.environ.get('MILA_MM_SLOW'):
        for item in items:
            if item.get_closest_marker('slow'):
                item.add_marker(pytest.mark.skip(reason='takes minutes: MILA_MM_SLOW=1, as make test-scale sets it'))


@pytest.fixture(autouse=True)
def no_traces_in_mmengine() -> Iterator[None]:
    """Forget mmengine's global instances (default scope, loggers, hubs, visualizers) that a test has left behind."""
    yield
    if 'mmengine.utils' in sys.modules:
        from mmengine.utils import ManagerMixin

        kinds = [ManagerMixin]
        for kind in kinds:
            kinds.extend(kind.__subclasses__())
            if '_instance_dict' in vars(kind):
                kind._instance_dict.clear()


@pytest.fixture(scope='session')
def root() -> Path:
    """Return the root of the checkout."""
    return ROOT


@pytest.fixture(scope='session')
def sample_data() -> Path:
    """Return the folder with real images in the layouts of COCO and ADE20K; skips where there is none."""
    if not (SAMPLE_DATA / 'coco8').is_dir():
        pytest.skip(f'no sample images at {SAMPLE_DATA}; MILA_MM_SAMPLE_DATA names another folder')
    return SAMPLE_DATA
