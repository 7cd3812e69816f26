"""Bilinear sampling as gathers: which cells of a feature table a point reads, and with what weights.

Sums of such samples are ``torch.nn.functional.embedding_bag`` over the table of cells: a single pass
that holds no sampled feature in memory and has gradients for both the table and the weights.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def bilinear_corners(y: Tensor, x: Tensor, first_cell: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cells and weights of bilinear samples with the border rule of RoIAlign.

    Points up to one cell outside read the border; points farther out read nothing.

    Args:
        y: (P,) row coordinates, cell centres at integers.
        x: (P,) column coordinates.
        first_cell: (P,) int64 index of cell (0, 0) of the map that each point reads.
        size: (height, width) of the maps.

    Returns:
        int64 indices (P, 4) and weights (P, 4), differentiable by ``y`` and ``x``.
    """
    height, width = size
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.detach().floor(), x.detach().floor()
    fy, fx = y - top, x - left
    row = torch.stack((top, (top + 1).clamp_(max=height - 1)), -1).long()
    column = torch.stack((left, (left + 1).clamp_(max=width - 1)), -1).long()
    index = first_cell[:, None, None] + row[:, :, None] * width + column[:, None, :]
    weight = torch.stack((1 - fy, fy), -1)[:, :, None] * torch.stack((1 - fx, fx), -1)[:, None, :]
    weight = weight * inside[:, None, None]
    # A point that is not finite, or far outside, must not index beyond the table.
    index = torch.where(inside[:, None, None], index, first_cell[:, None, None])
    return index.flatten(1), weight.flatten(1)


def weighted_sum(table: Tensor, index: Tensor, weight: Tensor, starts: Tensor | None = None) -> Tensor:
    """Sum table rows with weights, bag by bag.

    Args:
        table: (rows, channels).
        index: (bags, n) row numbers, or (samples,) with ``starts``.
        weight: Like ``index``, in the dtype of ``table``.
        starts: (bags,) first sample of every bag, for bags of different sizes.

    Returns:
        (bags, channels); zeros for an empty bag.
    """
    return embedding_bag(index, table, starts, mode='sum', per_sample_weights=weight)


@dataclass
class RoIGrid:
    """The sampling points of RoIAlign for a set of boxes.

    Attributes:
        image: (R,) int64 image index.
        start: (R, 2) y and x of the box's first corner in feature cells.
        bin_size: (R, 2) height and width of a bin.
        samples: (R, 2) int64 samples per bin, down and across.
        bins: Bins down and across.
        first: Which box of the whole set is the first here.
    """

    image: Tensor
    start: Tensor
    bin_size: Tensor
    samples: Tensor
    bins: tuple[int, int]
    first: int = 0

    @property
    def rows(self) -> slice:
        """The place of these boxes in the whole set."""
        return slice(self.first, self.first + len(self.image))

    @property
    def bags(self) -> int:
        """Number of bins of all boxes."""
        return len(self.image) * self.bins[0] * self.bins[1]

    @property
    def per_bin(self) -> Tensor:
        """(R,) samples in each bin of a box."""
        return self.samples.prod(-1)

    def runs(self, limit: int) -> Iterator['RoIGrid']:
        """Cut the boxes into consecutive runs of about ``limit`` samples, at least one box each."""
        ends = (self.per_bin * (self.bins[0] * self.bins[1])).cumsum(0).cpu()
        begin = 0
        while begin < len(ends):
            done = int(ends[begin - 1]) if begin else 0
            end = max(int(torch.searchsorted(ends, done + limit, right=True)), begin + 1)
            part = (v[begin:end] for v in (self.image, self.start, self.bin_size, self.samples))
            yield RoIGrid(*part, bins=self.bins, first=self.first + begin)
            begin = end

    def points(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every sampling point, bin by bin in the order box, bin row, bin column, sample row, sample column.

        Returns:
            y (P,), x (P,), the bin (P,) of 0 .. bags - 1, and the image (P,) of each point.
        """
        across, device = self.bins[0] * self.bins[1], self.image.device
        count = self.per_bin.repeat_interleave(across)
        bag = torch.arange(self.bags, device=device).repeat_interleave(count)
        number = torch.arange(len(bag), device=device) - (count.cumsum(0) - count)[bag]
        box = bag // across
        bin_yx = torch.stack((bag % across // self.bins[1], bag % self.bins[1]), -1)
        samples = self.samples[box]
        sample_yx = torch.stack((number // samples[:, 1], number % samples[:, 1]), -1)
        size = self.bin_size[box]
        y, x = (self.start[box] + bin_yx * size + (sample_yx + 0.5) * size / samples).unbind(-1)
        return y, x, bag, self.image[box]


def roi_grid_points(
    rois: Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> RoIGrid:
    """Lay the sampling grid of RoIAlign over boxes.

    Args:
        rois: (R, 5): image index, x1, y1, x2, y2 in image coordinates.
        spatial_scale: Feature cells per image pixel.
        sampling_ratio: Samples per bin and side; 0 for one per feature cell.
        aligned: Shift by half a cell; otherwise boxes are made at least one cell large.
    """
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start, extent = corners[:, :2].flip(-1), (corners[:, 2:] - corners[:, :2]).flip(-1)
    if not aligned:
        extent = extent.clamp(min=1)
    bin_size = extent / extent.new_tensor((height, width))
    samples = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil().clamp_(min=0)
    return RoIGrid(rois[:, 0].long(), start, bin_size, samples.long(), (height, width))
