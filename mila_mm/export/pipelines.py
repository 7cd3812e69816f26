"""What the test pipeline of a config does to pixels before the model sees them: a file does not do it."""

from __future__ import annotations

from mmengine.config import Config

from mila_mm.engine.data.splits import kind_name, splits_of, transforms_in
from mila_mm.errors import UserError

# These change values, of mmcv, mmdet, mmseg and mmpretrain; a file would be compared and used without them.
_PIXELS = ('Normalize', 'RGB2Gray', 'CLAHE', 'Rerange', 'AdjustGamma', 'PhotoMetricDistortion', 'Invert', 'Grayscale')
# Loading, resizing and packing, which whoever runs the file does, and labels; by how their names begin
_PLAIN = ('Load', 'Pack', 'Resize', 'Pad', 'CenterCrop', 'RandomFlip', 'Keep', 'FixShape', 'Filter', 'Reduce')


def check_pipeline(cfg: Config, scope: str) -> list[str]:
    """Return notes on what the test pipeline does and a file does not.

    Args:
        cfg: The config.
        scope: 'mmdet' or 'mmseg'.

    Raises:
        UserError: If a transform changes the values of pixels.
    """
    notes: list[str] = []
    for split in splits_of(cfg, ['test'], scope, by_source=True):
        for step in transforms_in(split.steps):
            name = kind_name(step)
            if name in _PIXELS:
                raise UserError(
                    f'export: the test pipeline ({split.key}.pipeline) has {name}, which changes pixels before the '
                    "model; a file takes plain RGB images. Normalisation goes into the model's data_preprocessor, "
                    'mean and std; what else the model needs has no exported form'
                )
            if name == 'Pad' and 'size' in step:
                filled = step.get('pad_val', 0)
                filled = filled.get('img', 0) if isinstance(filled, dict) else filled
                notes.append(
                    f'the test pipeline pads images to {_by(step["size"])} with {filled}, and takes that for content: '
                    'a file gives the numbers of mila test on images padded so, with the size of the whole'
                )
            elif not name.startswith(_PLAIN) and 'Resize' not in name:
                notes.append(f'the test pipeline has {name}; the file does not do what it does')
    return list(dict.fromkeys(notes))


def _by(size: object) -> str:
    return ' x '.join(map(str, size)) if isinstance(size, (list, tuple)) else str(size)
