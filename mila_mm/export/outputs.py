"""The names and meaning of what exported files take and return; the only place that says so."""

from __future__ import annotations

IMAGE = 'image: uint8 (batch, height, width, 3), RGB'
SIZE = 'size: int64 (batch, 2), height and width of the content, which lies at the top left; the rest is padding'

INPUTS = {'detector': ('image', 'size'), 'segmentor': ('image',), 'classifier': ('image',)}
DESCRIPTIONS = {
    'boxes': 'float32 (batch, most, 4): x1, y1, x2, y2 in pixels of the image; zeros behind count',
    'scores': 'float32 (batch, most), falling; for a classifier (batch, classes), of a softmax',
    'labels': 'int64 (batch, most), index of the class; -1 behind count. For a segmentor uint8, or int32 for more than '
    '256 classes, (batch, height, width)',
    'count': 'int64 (batch,): detections of each image',
    'masks': 'float32 (batch, most, 28, 28): probability in a grid over the box, to be pasted and compared with '
    'mask_threshold; or, pasted, bool (batch, most, height, width)',
    'logits': 'float32 (batch, classes, height, width); of a head with one channel its sigmoid',
}
