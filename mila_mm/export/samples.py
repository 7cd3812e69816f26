"""Images to check a file on, and what the model itself says to them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.fileio import join_path
from torch import nn

from mila_mm.engine.config.load import one_line
from mila_mm.errors import UserError
from mila_mm.export.deployed import Deployed

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp')


def find_images(given: Sequence[str], cfg: Config, count: int) -> list[Path]:
    """Return up to ``count`` images: those given (files or folders), else of the config's test set, else none.

    Raises:
        UserError: If a given one does not exist or holds no image.
    """
    found: list[Path] = []
    for name in given:
        path = Path(name)
        try:
            there = path.exists()
        except OSError as error:  # a name that is too long
            raise UserError(f'--images {name}: {error.strerror}') from error
        if not there:
            raise UserError(f'--images {name} does not exist')
        files = _images_in(path) if path.is_dir() else [path]
        if not files:
            raise UserError(f'--images {name}: no image in this folder (looked for {", ".join(_SUFFIXES)})')
        found += files
    if not given:
        dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
        prefix = dataset.get('data_prefix') or dataset.get('split') or ''  # the last two of mmpretrain, a string
        prefix = prefix if isinstance(prefix, str) else prefix.get('img') or prefix.get('img_path') or ''
        folder = Path(join_path(dataset.get('data_root') or '', prefix))
        found = _images_in(folder) if dataset.get('data_root') and os.path.isdir(folder) else []
    return found[:count]


def _images_in(folder: Path) -> list[Path]:
    """The images of a folder; where it has none, those of the folders in it, as classifiers' sets are laid out."""
    found: list[Path] = []
    for pattern in ('*', '*/*'):
        found = found or [x for x in folder.glob(pattern) if x.suffix.lower() in _SUFFIXES and x.is_file()]
    return sorted(found)


def load_images(paths: Sequence[Path], count: int, height: int, width: int) -> np.ndarray:
    """Read ``count`` images, repeating them if need be, stretched to a size; drawn ones where there are none.

    Returns:
        (count, height, width, 3), uint8, RGB.
    """
    if not paths:
        return np.stack([_drawn(height, width, seed) for seed in range(count)])
    images = []
    for i in range(count):
        path = paths[i % len(paths)]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f'--images {path}: {one_line(error)}') from error
        image = mmcv.imfrombytes(content) if content else None  # BGR, None of what is no image
        if image is None:
            raise UserError(f'--images {path}: cannot be read as an image')
        images.append(mmcv.imresize(image[..., ::-1], (width, height)))
    return np.stack(images)


def _drawn(height: int, width: int, seed: int) -> np.ndarray:
    """A picture of overlapping shapes with soft shading: something for a network to see."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : complex(height), 0 : 1 : complex(width)]
    image = 128 + 60 * np.sin(6 * x[..., None] + random.uniform(0, 6, 3)) * np.cos(5 * y[..., None])
    for _ in range(12):
        cx, cy, rx, ry = random.uniform((0, 0, 0.05, 0.05), (1, 1, 0.25, 0.25))
        round_one = random.random() < 0.5
        distance = (
            np.hypot((x - cx) / rx, (y - cy) / ry) if round_one else np.maximum(abs(x - cx) / rx, abs(y - cy) / ry)
        )
        image = np.where((distance < 1)[..., None], random.uniform(0, 255, 3), image)
    return (image + random.normal(0, 4, image.shape)).clip(0, 255).astype(np.uint8)


def contents(deployed: Deployed, batch: int, height: int, width: int) -> np.ndarray:
    """Sizes (B, 2) of the content in a batch: the first image fills it; of a detector the others are smaller."""
    sizes = np.array([[height, width]] * batch, dtype=np.int64)
    if deployed.kind == 'detector':
        sizes[1:] = sizes[1:] * 3 // 4
    return sizes


def inputs_of(deployed: Deployed, images: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Name the inputs of a file."""
    named = {'image': images, 'size': sizes}
    return {name: named[name] for name in deployed.input_names}


@torch.no_grad()
def predict(model: nn.Module, kind: str, images: np.ndarray, sizes: np.ndarray) -> list[dict[str, Any]]:
    """Ask the trained model itself, through its own ``test_step``.

    Args:
        model: In eval mode.
        kind: 'detector', 'segmentor' or 'classifier'.
        images: (B, H, W, 3), uint8, RGB.
        sizes: (B, 2), height and width of each image's content.

    Returns:
        For each image arrays under the names of the file's results; masks are pasted ones of the content's size.
    """
    bgr = [torch.from_numpy(x[:h, :w, ::-1].copy()).permute(2, 0, 1) for x, (h, w) in zip(images, sizes, strict=True)]
    if kind == 'classifier':
        data = model.data_preprocessor({'inputs': torch.stack(bgr)}, False)
        return [{'scores': x.numpy()} for x in model(data['inputs']).float().softmax(-1)]
    metas = [dict(img_shape=(int(h), int(w)), ori_shape=(int(h), int(w)), scale_factor=(1.0, 1.0)) for h, w in sizes]
    if kind == 'segmentor':
        from mmseg.structures import SegDataSample

        samples = model.test_step({'inputs': bgr, 'data_samples': [SegDataSample(metainfo=meta) for meta in metas]})
        return [{'labels': x.pred_sem_seg.data[0].numpy(), 'logits': x.seg_logits.data.numpy()} for x in samples]
    from mmdet.structures import DetDataSample

    samples = model.test_step({'inputs': bgr, 'data_samples': [DetDataSample(metainfo=meta) for meta in metas]})
    results = []
    for sample in samples:
        found = sample.pred_instances
        entry = {'boxes': found.bboxes, 'scores': found.scores, 'labels': found.labels}
        if 'masks' in found:
            entry['masks'] = found.masks
        results.append({name: x.numpy() for name, x in entry.items()})
    return results
