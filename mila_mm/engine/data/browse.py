"""Batches as the model sees them, augmented and normalised, drawn with their boxes, masks and label maps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, VISUALIZERS
from mmengine.structures import PixelData

from mila_mm.engine.config.build_errors import building
from mila_mm.engine.config.load import scope_of
from mila_mm.engine.data.splits import kind_name
from mila_mm.engine.runner.runner import Runner
from mila_mm.errors import UserError
from mila_mm.visualization.name_places import NamePlaces

# Longer side in pixels up to which small images are enlarged, and the side of a box that has room for its name.
_SIDE, _ROOM = 1000, 60
# A label map covers the whole image, which must be seen through it.
_SEEN_THROUGH = {'mmseg': {'alpha': 0.5}}


def browse(cfg: Config, stage: str, number: int, out: Path | None, show: bool) -> list[Path]:
    """Draw the first samples of a split.

    Args:
        cfg: A config.
        stage: 'train', 'val' or 'test'.
        number: Samples to draw.
        out: Folder for the pictures, None for none.
        show: Whether to open a window for each.

    Returns:
        The pictures that were written.

    Raises:
        UserError: If the split or its data does not work.
    """
    loader_config = cfg.get(f'{stage}_dataloader')
    if not isinstance(loader_config, dict):
        raise UserError(f'--split {stage}: the config has no {stage}_dataloader')
    scope = scope_of(cfg)
    cfg.setdefault('default_scope', scope)
    loader_config = {**loader_config, 'num_workers': 0, 'persistent_workers': False}
    loader_config.pop('prefetch_factor', None)
    if stage != 'train':
        loader_config['dataset'] = _annotations_first(loader_config['dataset'])
    with MODELS.switch_scope_and_registry(scope) as models, VISUALIZERS.switch_scope_and_registry(scope) as visualizers:
        loader = Runner.build_dataloader(loader_config)
        with building('model.data_preprocessor'):
            config = (
                cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or dict(type='BaseDataPreprocessor')
            )
            preprocessor = models.build(config)
        kind = 'DetLocalVisualizer' if scope == 'mmdet' else 'SegLocalVisualizer'
        visualizer = visualizers.build(dict(type=kind, name=f'browse_{stage}', **_SEEN_THROUGH.get(scope, {})))
    dataset = loader.dataset
    visualizer.dataset_meta = dataset.metainfo
    written: list[Path] = []
    for index, seen in enumerate(_samples(loader, preprocessor, stage == 'train')):
        if index == number:
            break
        image, sample = _enlarge(*seen)
        _name_large_boxes(sample, dataset.metainfo.get('classes'))
        _part_names(visualizer, sample, dataset.metainfo.get('classes'))
        path = None if out is None else out / f'{index:03}_{Path(str(sample.get("img_path", "image"))).stem}.png'
        visualizer.add_datasample(
            f'{stage} {index}',
            image,
            data_sample=sample,
            draw_gt=True,
            draw_pred=False,
            show=show,
            out_file=None if path is None else str(path),
        )
        written += [path] if path is not None else []
    return written


def _annotations_first(dataset: Any) -> Any:
    """A copy of a dataset's config that loads annotations before it resizes.

    Pipelines of tests load them last, so that a metric finds them in the size of the file; drawn on the resized image
    they would be out of place.
    """
    if not isinstance(dataset, dict):
        return dataset
    inner = {key: _annotations_first(dataset[key]) for key in ('dataset',) if key in dataset}
    if isinstance(dataset.get('datasets'), (list, tuple)):
        inner['datasets'] = [_annotations_first(each) for each in dataset['datasets']]
    if isinstance(dataset.get('pipeline'), (list, tuple)):
        inner['pipeline'] = sorted(dataset['pipeline'], key=lambda step: not kind_name(step).startswith('Load'))
    return {**dataset, **inner}


def _samples(loader: Any, preprocessor: Any, training: bool) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield the images (H, W, 3) uint8 RGB and samples of batches, after the preprocessor and its augmentations."""
    for batch in loader:
        seen = preprocessor(batch, training)
        for image, sample in zip(seen['inputs'], seen['data_samples'], strict=True):
            pixels = as_rgb(image, preprocessor)
            if not training:  # the padding of a batch, which annotations of a test do not get
                height, width = sample.get('img_shape', pixels.shape)[:2]
                pixels = np.ascontiguousarray(pixels[:height, :width])
            yield pixels, _drawable(sample)


def as_rgb(image: torch.Tensor, preprocessor: Any) -> np.ndarray:
    """Take back the normalisation; what a preprocessor does not turn to RGB was loaded as BGR."""
    image = image.detach().cpu().float()
    if getattr(preprocessor, '_enable_normalize', False):
        image = image * preprocessor.std.cpu() + preprocessor.mean.cpu()
    pixels = image.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    turned = getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', False))
    return np.ascontiguousarray(pixels if turned else pixels[..., ::-1])


def _enlarge(image: np.ndarray, sample: Any) -> tuple[np.ndarray, Any]:
    """Repeat the pixels of a small image, with its boxes and masks, so that lines and names do not cover them."""
    height, width = image.shape[:2]
    factor = max(1, round(_SIDE / max(height, width)))
    if factor == 1:
        return image, sample
    instances = sample.get('gt_instances')
    if instances is not None and 'bboxes' in instances:
        instances.bboxes = instances.bboxes * factor
    if instances is not None and hasattr(instances.get('masks'), 'resize'):
        instances.masks = instances.masks.resize((height * factor, width * factor))
    for name in ('gt_sem_seg', 'gt_panoptic_seg'):
        maps = sample.get(name)
        if maps is not None:
            larger = {
                key: value.repeat_interleave(factor, -2).repeat_interleave(factor, -1) for key, value in maps.items()
            }
            setattr(sample, name, PixelData(**larger))
    return image.repeat(factor, 0).repeat(factor, 1), sample


def _name_large_boxes(sample: Any, classes: Any) -> None:
    """Write names at boxes that have room for one; the others are told by their colour."""
    instances = sample.get('gt_instances')
    if instances is None or 'bboxes' not in instances or 'labels' not in instances or not classes:
        return
    sides = (instances.bboxes[:, 2:] - instances.bboxes[:, :2]).amin(1)
    pairs = zip(instances.labels.tolist(), sides.tolist(), strict=True)
    instances.label_names = [str(classes[label]) if side >= _ROOM else '' for label, side in pairs]


def _part_names(visualizer: Any, sample: Any, classes: Any) -> None:
    """Keep the names that mmseg writes on a label map apart and inside of the picture."""
    maps = sample.get('gt_sem_seg')
    own = getattr(type(visualizer), '_get_center_loc', None)
    if maps is not None and classes and own is not None:
        visualizer._get_center_loc = NamePlaces(partial(own, visualizer), maps.data[0].numpy(), classes)


def _drawable(sample: Any) -> Any:
    """Give the visualizer plain tensors for boxes."""
    instances = sample.get('gt_instances')
    if instances is not None and 'bboxes' in instances and hasattr(instances.bboxes, 'tensor'):
        instances.bboxes = instances.bboxes.tensor
    return sample.cpu()
