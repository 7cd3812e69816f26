"""Fixtures shared by all tests."""

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import mila_mm  # noqa: F401 - before any test imports mmdet, which looks for mmcv's ops once

ROOT = Path(__file__).resolve().parent.parent
# A kernel that does not work must fail the test that is about it, and not hand over to PyTorch's operators.
os.environ.setdefault('MILA_MM_KERNEL_ERRORS', 'raise')
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


@pytest.fixture
def no_folder_sync(monkeypatch) -> list[int]:
    """Refuse to fsync folders, as SMB, FUSE and some NFS servers do; returns the descriptors that were refused."""
    refused: list[int] = []
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError((errno.EINVAL, errno.EBADF, errno.ENOTSUP)[len(refused) % 3], 'not for folders')
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', refuse)
    return refused


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


@pytest.fixture(scope='session')
def weighted_sum() -> Callable[..., torch.Tensor]:
    """A loss that depends on every number of a model's maps.

    The mean square of what a LayerNorm gives is constant by construction: gradients of such a loss are rounding errors,
    and comparing them shows nothing.
    """

    def total(maps: Iterable[torch.Tensor]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        weights = (torch.randn(m.shape, generator=generator, dtype=torch.float64) for m in maps)
        return sum((m.double() * w.to(m.device)).sum() / m.shape[0] for m, w in zip(maps, weights, strict=True))

    return total


@pytest.fixture(scope='session')
def same_gradients() -> Callable[..., None]:
    """Compare gradients by name, each relative to its largest entry, and see that there is something to compare."""

    def check(
        got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float, share: float = 0.9
    ) -> None:
        assert got.keys() == expected.keys()
        largest = {name: grad.abs().max().item() for name, grad in expected.items()}
        telling = [name for name, size in largest.items() if size > 1e-3]
        assert len(telling) >= share * len(largest), f'only {len(telling)} of {len(largest)} gradients tell anything'
        floor = 0.01 * max(largest.values())  # a bias before a BatchNorm has the rounding errors of a large sum
        for name, grad in expected.items():
            error = (got[name] - grad).abs().max().item()
            assert error <= tolerance * max(largest[name], floor), f'{name}: {error:.1e} of {largest[name]:.1e}'

    return check


@pytest.fixture(scope='session')
def released_weights():
    """Draw the weights that the stored outputs were computed from; RoPE buffers have no part in the recipe."""

    def draw(shapes):
        rng = np.random.default_rng(2024)
        weights = {}
        for key in sorted(shapes):
            shape = tuple(shapes[key])
            if key.endswith('num_batches_tracked'):
                weights[key] = torch.zeros(shape, dtype=torch.int64)
                continue
            values = rng.standard_normal(shape).astype(np.float32)
            if key.endswith('running_var'):
                values = 1 + np.float32(0.1) * np.abs(values)
            elif key.endswith(('running_mean', 'bias')):
                values = np.float32(0.1) * values
            elif values.ndim == 1:
                values = 1 + np.float32(0.1) * values
            else:
                values = values / np.sqrt(np.prod(shape[1:])).astype(np.float32)
            weights[key] = torch.from_numpy(values)
        return weights

    return draw
