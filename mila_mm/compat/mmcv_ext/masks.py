"""Ops that move cells by masks: the point-wise spatial attention mask, and masked convolution's gathers."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from mila_mm.compat.mmcv_ext.common import hand_over

COLLECT, DISTRIBUTE = 0, 1


def psamask_forward(
    input: Tensor,
    output: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Spread each cell's attention window over the whole map (PSANet, Zhao et al., 2018).

    Args:
        input: (B, h_mask * w_mask, H, W): at each cell, a window of weights around it.
        output: (B, H * W, H, W). Distribute: row (h, w) holds the window of cell (h, w) in place;
            collect: its transpose over the two cells. 0 outside the window.
        psa_type: 0 collect, 1 distribute.
        num_: B.
        h_feature: H.
        w_feature: W.
        h_mask: Window height.
        w_mask: Window width.
        half_h_mask: Window row that lies on the cell itself.
        half_w_mask: Window column that lies on the cell itself.
    """
    window, inside = _window_index(input, (h_feature, w_feature), (h_mask, w_mask), (half_h_mask, half_w_mask))
    collected = input.flatten(2).gather(1, window.expand(num_, -1, -1)).mul_(inside)
    if psa_type == DISTRIBUTE:
        collected = collected.transpose(1, 2)
    hand_over(output, collected.reshape(output.shape))


def psamask_backward(
    grad_output: Tensor,
    grad_input: Tensor,
    psa_type: int,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> None:
    """Gradient of ``psamask_forward``.

    The arguments that are not named here are those of the forward.

    Args:
        grad_output: (B, H * W, H, W).
        grad_input: (B, h_mask * w_mask, H, W), output.
    """
    window, inside = _window_index(grad_input, (h_feature, w_feature), (h_mask, w_mask), (half_h_mask, half_w_mask))
    grad = grad_output.flatten(2)
    if psa_type == DISTRIBUTE:
        grad = grad.transpose(1, 2)
    result = grad.new_zeros(grad_input.flatten(2).shape)
    result.scatter_add_(1, window.expand(num_, -1, -1), grad * inside)
    hand_over(grad_input, result.view(grad_input.shape))


def _window_index(
    like: Tensor, size: tuple[int, int], window: tuple[int, int], centre: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Which window entry of cell j lies on cell i, for all pairs of cells.

    Returns:
        int64 (1, H * W, H * W), indexed (i, j), and whether there is such an entry (else 0).
    """
    place = []
    for cells, extent, middle in zip(size, window, centre, strict=True):
        at = torch.arange(cells, device=like.device)
        entry = at[:, None] - at[None, :] + middle
        place.append((entry, (entry >= 0) & (entry < extent)))
    (row, row_inside), (column, column_inside) = place
    index = row[:, None, :, None] * window[1] + column[None, :, None, :]
    inside = row_inside[:, None, :, None] & column_inside[None, :, None, :]
    count = size[0] * size[1]
    return (index * inside).view(1, count, count), inside.view(1, count, count)


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Gather the windows of chosen cells into the columns of a matrix.

    Args:
        im: (1, C, H, W).
        mask_h_idx: (M,) int64 rows of the chosen output cells.
        mask_w_idx: (M,) int64 columns.
        col: (C * kernel_h * kernel_w, M), output; 0 beyond the border.
    """
    padded = pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    row = mask_h_idx[None, :] + torch.arange(kernel_h, device=im.device)[:, None]
    column = mask_w_idx[None, :] + torch.arange(kernel_w, device=im.device)[:, None]
    hand_over(col, padded[:, row[:, None], column[None, :]].flatten(0, 2))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Put the columns of a matrix in the chosen cells.

    Args:
        col: (channels, M).
        mask_h_idx: (M,) int64 rows of the chosen cells.
        mask_w_idx: (M,) int64 columns.
        im: (1, channels, height, width), output; other cells keep what they hold.
    """
    im[0, :, mask_h_idx, mask_w_idx] = col.to(im.dtype)
