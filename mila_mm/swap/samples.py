"""Generated batches that any detector or segmentor of a config can train on: noise with random labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

Batch = dict[str, Any]

_SEED = 0


def make_batch(model: dict[str, Any], scope: str, size: tuple[int, int], num_images: int = 2) -> Batch:
    """Make a batch as a dataloader would collate it.

    Args:
        scope: 'mmdet' or 'mmseg'.
        size: Height and width of the images.
        num_images: Images in the batch. Defaults to 2.

    Returns:
        ``inputs`` and ``data_samples`` for the model's data preprocessor.
    """
    if scope == 'mmseg':
        return _segmentation(model, size, num_images)
    kind = str(model.get('type'))
    if kind.endswith('ReID'):
        return _identities(size, num_images)
    if kind.endswith('Video'):
        return _video(model, size, num_images)
    return _detection(model, size, num_images)


def _numbers_under(node: Any, names: tuple[str, ...]) -> Iterator[int]:
    """Yield the integers that stand under some keys anywhere in a config."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in names and isinstance(value, int) and not isinstance(value, bool):
                yield value
            else:
                yield from _numbers_under(value, names)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _numbers_under(value, names)


def _detection(model: dict[str, Any], size: tuple[int, int], num_images: int) -> Batch:
    from mmdet.testing import demo_mm_inputs
    from mmengine.structures import InstanceData, PixelData

    things = min((n for n in _numbers_under(model, ('num_classes', 'num_things_classes')) if n > 0), default=1)
    channels = (model.get('backbone') or {}).get('in_channels', 3)
    channels = channels if isinstance(channels, int) else 3
    batch = demo_mm_inputs(
        num_images,
        (channels, *size),
        num_items=[3] * num_images,
        num_classes=max(2, things),
        with_mask=_wants_masks(model),
    )
    generator = torch.Generator().manual_seed(_SEED)
    stuff = min((n for n in _numbers_under(model, ('num_stuff_classes',)) if n > 0), default=None)
    # Hybrid Task Cascade supervises its semantic head at 1/8; the others resize the labels themselves.
    stride = 8 if isinstance((model.get('roi_head') or {}).get('semantic_head'), dict) else 1
    classes = things if stuff is None else things + stuff
    for sample in batch['data_samples']:
        boxes = sample.gt_instances.bboxes
        # no empty boxes: a generated one may have no side
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 8)
        sample.gt_instances.labels %= things
        sample.ignored_instances = InstanceData(bboxes=boxes.new_zeros((0, 4)))
        if not model.get('rpn_head'):  # given proposals, a detector that has one does not ask it in a prediction
            sample.proposals = InstanceData(bboxes=boxes.repeat(8, 1), scores=boxes.new_ones(24))
        labels = torch.randint(0, classes, (1, size[0] // stride, size[1] // stride), generator=generator)
        sample.gt_sem_seg = PixelData(sem_seg=labels)
    return batch


def _wants_masks(model: dict[str, Any]) -> bool:
    """Tell whether a detector learns masks: some heads for boxes alone stumble over them."""
    return 'mask' in repr({k: v for k, v in model.items() if k not in ('data_preprocessor', 'backbone')}).lower()


def _video(model: dict[str, Any], size: tuple[int, int], num_images: int) -> Batch:
    from mmdet.testing import demo_track_inputs

    things = min((n for n in _numbers_under(model, ('num_classes', 'num_things_classes')) if n > 0), default=1)
    return demo_track_inputs(
        num_images, num_frames=2, key_frames_inds=[0], image_shapes=(3, *size), num_classes=things, with_mask=True
    )


def _identities(size: tuple[int, int], num_images: int) -> Batch:
    from mmdet.structures import ReIDDataSample

    samples = []
    for index in range(num_images):
        sample = ReIDDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        samples.append(sample.set_gt_label(index))
    return {'inputs': list(_noise(num_images, 3, size)), 'data_samples': samples}


def _segmentation(model: dict[str, Any], size: tuple[int, int], num_images: int) -> Batch:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(_SEED)
    classes = min((n for n in _numbers_under(model, ('num_classes',)) if n > 1), default=2)
    channels = (model.get('backbone') or {}).get('in_channels', 3)
    samples = []
    for _ in range(num_images):
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, flip=False))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, *size), generator=generator))
        sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, *size), generator=generator))
        sample.gt_depth_map = PixelData(data=torch.rand((1, *size), generator=generator) + 0.5)
        samples.append(sample)
    return {
        'inputs': list(_noise(num_images, channels if isinstance(channels, int) else 3, size)),
        'data_samples': samples,
    }


def _noise(num_images: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, 256, (num_images, channels, *size), generator=generator, dtype=torch.uint8)
