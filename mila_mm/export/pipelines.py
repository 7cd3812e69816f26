"""What the test pipeline of a config does to pixels before the model sees them: a file does not do it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from mila_mm.engine.data.splits import kind_name, transforms_in
from mila_mm.errors import UserError

# These change values, of mmcv, mmdet, mmseg and mmpretrain; a file would be compared and used without them.
_PIXELS = ('Normalize', 'RGB2Gray', 'CLAHE', 'Rerange', 'AdjustGamma', 'PhotoMetricDistortion', 'Invert')
# Loading, sizes and packing, which whoever runs the file does, and labels; by how their names begin
_PLAIN = ('Load', 'Pack', 'Pad', 'RandomFlip', 'Keep', 'FixShape', 'Filter', 'Reduce')


def check_pipeline(cfg: Config) -> list[str]:
    """Return notes on what the pipeline of a config's test set does and a file does not.

    Raises:
        UserError: If a transform changes the values of pixels.
    """
    loader = cfg.get('test_dataloader')
    dataset = loader.get('dataset') if isinstance(loader, dict) else None
    notes = [note for pipeline in _pipelines(dataset) for step in transforms_in(pipeline) if (note := _note(step))]
    return list(dict.fromkeys(notes))


def _pipelines(dataset: Any) -> Iterator[Any]:
    """Those of a data set, of its wrappers and of the data sets in them."""
    if isinstance(dataset, dict):
        yield dataset.get('pipeline')
        yield from _pipelines(dataset.get('dataset'))
        yield from _pipelines(dataset.get('datasets'))
    elif isinstance(dataset, (list, tuple)):
        for each in dataset:
            yield from _pipelines(each)


def _note(step: dict[str, Any]) -> str | None:
    name = kind_name(step).rpartition('/')[2]
    if name in _PIXELS:
        raise UserError(
            f'export: the test pipeline has {name}, which changes pixels before the model; a file takes plain RGB '
            "images. Normalisation goes into the model's data_preprocessor, mean and std; what else the model needs "
            'has no exported form'
        )
    if name == 'Pad':
        filled = step.get('pad_val', 0)
        filled = filled.get('img', 0) if isinstance(filled, dict) else filled
        return (
            f'the test pipeline pads images {_by(step)} with {filled}, and takes that for content: a file gives the '
            'numbers of mila test on images padded so, with the size of the whole'
        )
    if name == 'LoadImageFromFile' and step.get('color_type', 'color') != 'color':
        return f'the test pipeline loads images as {step["color_type"]}; a file takes RGB'
    if name == 'RandomFlip' and step.get('prob'):
        return 'the test pipeline flips images by chance; a file does not'
    if name.startswith(_PLAIN) or 'Resize' in name or 'Crop' in name:
        return None
    return f'the test pipeline has {name}; the file does not do what it does'


def _by(step: dict[str, Any]) -> str:
    size = step.get('size')
    if size is not None:
        return 'to ' + (' x '.join(map(str, size)) if isinstance(size, (list, tuple)) else str(size))
    return 'to squares' if step.get('pad_to_square') else f'to multiples of {step.get("size_divisor")}'
