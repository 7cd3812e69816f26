"""Models with random weights, pictures and videos."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

DETECTOR, SEGMENTOR = 'mask_rcnn_mila_nano_shapes', 'upernet_mila_nano_shapes'


@pytest.fixture(scope='session')
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write random weights for a config of the package, once."""
    from mmengine.registry import MODELS, init_default_scope

    from mila_mm.engine import load_config

    folder = tmp_path_factory.mktemp('weights')

    def write(config: str) -> Path:
        path = folder / f'{Path(config).stem}.pth'
        if not path.exists():
            cfg = load_config(config)
            init_default_scope(cfg.default_scope)
            torch.manual_seed(0)
            torch.save({'state_dict': MODELS.build(cfg.model).state_dict(), 'meta': {}}, path)
        return path

    return write


def picture(path: Path, height: int = 48, width: int = 64, seed: int = 0) -> Path:
    """Write a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of two sizes, one that is none, and a file of another kind."""
    place = tmp_path / 'pictures'
    picture(place / 'a.jpg')
    picture(place / 'b.png', 40, 56, 1)
    picture(place / 'c.bmp', seed=2)
    (place / 'broken.jpg').write_bytes(b'\xff\xd8\xff no more')
    (place / 'notes.txt').write_text('not a picture')
    return place


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Eight frames of 64 x 48 at 10 frames per second, as MJPG."""
    path = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 10.0, (64, 48))
    for seed in range(8):
        writer.write(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    return path
