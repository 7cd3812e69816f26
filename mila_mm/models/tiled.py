"""Segmentation of images of any size in tiles: the device never sees more than a few tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.model import BaseTTAModel
from mmengine.structures import PixelData
from torch import Tensor

from mila_mm.registry import MODELS


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin along one axis; the last one ends with the image, as mmseg's sliding windows do.

    Args:
        length: Side of the image, pixels.
        tile: Side of a tile.
        stride: Distance of two tiles.

    Returns:
        Increasing positions, of which the first is 0.
    """
    if length <= tile:
        return [0]
    steps = -(-(length - tile) // stride)
    return [min(i * stride, length - tile) for i in range(steps + 1)]


@MODELS.register_module()
class TiledSegmentor(BaseTTAModel):
    """Test a segmentor of mmseg on images of several thousand pixels a side.

    mmseg's ``mode='slide'`` keeps the image, the logits of all classes at every pixel and their counts on the
    device: 19 classes at 8192 x 8192 are 5 GB in fp32, three times over. Here the device holds one batch of tiles. The
    host holds the image, the label map (one byte a pixel) and the logits of one row of tiles. The windows and the
    average over overlaps are mmseg's, so are the labels, up to rounding.

    It takes images as they are: test pipelines must neither resize nor pad. For testing only; train the segmentor.

    Args:
        module: The segmentor or its config; checkpoints are the segmentor's.
        tile: Height and width of a tile.
        stride: Vertical and horizontal distance of two tiles.
        tiles_per_batch: Tiles that are computed together. Defaults to 1.
        logits_dtype: Of the sums on the host, 'float32', 'float16' or 'bfloat16'. Defaults to 'float32'.
        data_preprocessor: As for :class:`mmengine.model.BaseTTAModel`.

    Raises:
        ValueError: If tiles and strides leave gaps, or a number makes no sense.
    """

    def __init__(
        self,
        module: Any,
        tile: Sequence[int] = (1024, 1024),
        stride: Sequence[int] = (768, 768),
        tiles_per_batch: int = 1,
        logits_dtype: str = 'float32',
        data_preprocessor: Any = None,
    ) -> None:
        super().__init__(module, data_preprocessor)
        if len(tile) != 2 or len(stride) != 2 or not all(0 < s <= t for s, t in zip(stride, tile, strict=True)):
            raise ValueError(
                f'TiledSegmentor: expected 0 < stride <= tile on both axes, got tile={tuple(tile)}, '
                f'stride={tuple(stride)}'
            )
        if tiles_per_batch < 1:
            raise ValueError(f'TiledSegmentor: expected tiles_per_batch of at least 1, got {tiles_per_batch}')
        if logits_dtype not in ('float32', 'float16', 'bfloat16'):
            raise ValueError(
                f'TiledSegmentor: expected float32, float16 or bfloat16 for logits_dtype, got {logits_dtype!r}'
            )
        self.tile, self.stride = tuple(tile), tuple(stride)
        self.tiles_per_batch = tiles_per_batch
        self.logits_dtype = getattr(torch, logits_dtype)

    def merge_preds(self, data_samples_list: list) -> list:
        """Not used: there is one prediction for each image."""
        raise NotImplementedError('TiledSegmentor augments nothing')

    def test_step(self, data: dict[str, Any]) -> list:
        """Segment a batch of images.

        Args:
            data: ``inputs``, a list of uint8 images (3, H, W) of any sizes on the CPU, and their ``data_samples``.

        Returns:
            The samples with ``pred_sem_seg``, (1, H, W) on the CPU, uint8 for up to 256 classes.

        Raises:
            ValueError: If an image is not of its file's size.
        """
        for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
            original = sample.metainfo.get('ori_shape')
            if original is not None and tuple(original[:2]) != tuple(image.shape[-2:]):
                raise ValueError(
                    f'TiledSegmentor: expected the image at its own size {tuple(original[:2])}, got '
                    f'{tuple(image.shape[-2:])}: take Resize and Pad out of the test pipeline'
                )
            labels = self.segment(image)
            sample.set_data({'pred_sem_seg': PixelData(data=labels[None])})
        return list(data['data_samples'])

    val_step = test_step

    @torch.no_grad()
    def segment(self, image: Tensor) -> Tensor:
        """Label every pixel of one image.

        Args:
            image: (3, H, W), uint8, on the CPU, as pipelines pack it.

        Returns:
            Labels (H, W) on the CPU, uint8 for up to 256 classes, else int32.
        """
        height, width = image.shape[-2:]
        size = min(self.tile[0], height), min(self.tile[1], width)
        columns = tile_starts(width, size[1], self.stride[1])
        rows = tile_starts(height, size[0], self.stride[0])
        per_column = self._counts(columns, size[1], width)
        labels: Tensor | None = None
        sums: Tensor | None = None
        counts = torch.zeros(size[0])
        for row, top in enumerate(rows):
            band = image[:, top : top + size[0]]
            for left, logits in self._logits(band, columns, size[1]):
                if sums is None:
                    sums = torch.zeros(logits.shape[0], size[0], width, dtype=self.logits_dtype)
                    labels = torch.empty(height, width, dtype=torch.uint8 if logits.shape[0] <= 256 else torch.int32)
                sums[:, :, left : left + size[1]] += logits
            counts += 1
            # What the next row of tiles does not reach is settled.
            done = (rows[row + 1] if row + 1 < len(rows) else height) - top
            self._settle(sums, counts, per_column, labels[top : top + done])
            if done < size[0]:
                # By copies of one class: source and target overlap.
                for plane in sums:
                    plane[: size[0] - done] = plane[done:].clone()
                counts[: size[0] - done] = counts[done:].clone()
            sums[:, max(size[0] - done, 0) :] = 0
            counts[max(size[0] - done, 0) :] = 0
        return labels

    @staticmethod
    def _counts(starts: list[int], tile: int, length: int) -> Tensor:
        counts = torch.zeros(length)
        for start in starts:
            counts[start : start + tile] += 1
        return counts

    def _logits(self, band: Tensor, columns: list[int], width: int) -> Iterator[tuple[int, Tensor]]:
        """Yield position and logits (classes, h, w) on the CPU of each tile of a row."""
        height = band.shape[1]
        for first in range(0, len(columns), self.tiles_per_batch):
            lefts = columns[first : first + self.tiles_per_batch]
            tiles = [band[:, :, left : left + width] for left in lefts]
            inputs = self.module.data_preprocessor({'inputs': tiles}, False)['inputs']
            meta = {key: tuple(inputs.shape[-2:]) for key in ('img_shape', 'pad_shape', 'ori_shape')}
            logits = self.module.encode_decode(inputs, [meta] * len(lefts))
            # One transfer; padding of the preprocessor goes.
            yield from zip(lefts, logits[:, :, :height, :width].float().cpu().to(self.logits_dtype), strict=True)

    def _settle(self, sums: Tensor, counts: Tensor, per_column: Tensor, labels: Tensor) -> None:
        """Write the labels (h, W) of the first h rows of the sums."""
        threshold = getattr(self.module.decode_head, 'threshold', None)
        for row in range(0, labels.shape[0], 64):  # by strips: argmax makes 8 bytes of each label
            strip = sums[:, row : min(row + 64, labels.shape[0])]
            if strip.shape[0] > 1:
                labels[row : row + strip.shape[1]] = strip.argmax(dim=0)
            else:
                mean = strip[0].float() / (counts[row : row + strip.shape[1], None] * per_column)
                labels[row : row + strip.shape[1]] = mean.sigmoid() > threshold
