"""Launchers of the MLP; :mod:`mila_mm.ops.feed_forward.kernels` states what they compute."""

import torch
from torch import Tensor

from mila_mm.ops.feed_forward import kernels as mlp_kernels
from mila_mm.ops.rows.launch import reduce_parts
from mila_mm.ops.triton import configs
from mila_mm.ops.triton.kept import Launch
from mila_mm.ops.triton.tensors import aligned, fp32_like, on_device, readable


def mlp_launch(
    batch: int,
    tokens: int,
    channels: int,
    hidden: int,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    shortcut: bool,
    scaled: bool,
) -> Launch:
    """For x and a shortcut of ``strides`` (B, N, B, N); takes x, the four parameters, shortcut, scale and y."""
    setting = configs.mlp_launch(channels)
    return Launch(
        mlp_kernels, 'mlp_kernel', (-(-tokens // setting.rows), 1, batch), (*strides, tokens, hidden),
        CHANNELS=channels, PADDED=max(16, configs.padded_width(channels)), BLOCK=setting.rows,
        CHUNK=setting.columns, STAGES=setting.stages, ALIGNED=aligned(channels),
        HAS_SHORTCUT=shortcut, HAS_SCALE=scaled,
        LOW=dtype == torch.float16 or (dtype == torch.bfloat16 and not configs.interpreted()),
        **setting.options(),
    )  # fmt: skip


def gelu_backward_launch(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Launch, int]:
    """For h in ``dtype``; takes h, its activation's gradient and parts, of which there are so many."""
    setting = configs.GELU_BACKWARD_FP32 if dtype == torch.float32 else configs.GELU_BACKWARD
    run = configs.column_rows_per_split(rows, hidden)
    splits = -(-rows // run)
    launch = Launch(
        mlp_kernels, 'gelu_backward_kernel', (-(-hidden // setting.columns), splits), (hidden, rows, run),
        BLOCK=setting.rows, CHANNELS=setting.columns, **setting.options(),
    )  # fmt: skip
    return launch, splits


def hidden_backward_launch(rows: int, channels: int, hidden: int) -> tuple[Launch, int]:
    """Takes x, y's gradient, fc1's weight and bias, fc2's weight, gelu(h), h's gradient and parts, so many.

    All of 16 bits, but the parts, and at one of ``configs.MLP_WIDTHS``.
    """
    setting = configs.HIDDEN_BACKWARD
    run = configs.column_rows_per_split(rows, hidden)
    splits = -(-rows // run)
    launch = Launch(
        mlp_kernels, 'hidden_backward_kernel', (-(-hidden // setting.columns), splits), (hidden, rows, run),
        CHANNELS=channels, PADDED=configs.padded_width(channels), BLOCK=setting.rows, CHUNK=setting.columns,
        LOW=not configs.interpreted(), **setting.options(),
    )  # fmt: skip
    return launch, splits


def mlp_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    shortcut: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """Run the kernel of :func:`mila_mm.ops.mlp`.

    Args:
        x: (B, N, C), any strides. fc1_weight: (hidden, C). fc2_weight: (C, hidden). Both of x's dtype.
        fc1_bias: (hidden,). fc2_bias: (C,). Of any float dtype.
        shortcut: (B, N, C) of any float dtype and strides, or None. scale: (B,) of any float dtype, or None.

    Returns:
        (B, N, C) contiguous in shortcut's dtype, or x's.
    """
    batch, tokens, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype if shortcut is None else shortcut.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x = readable(x, 64)
    other = x if shortcut is None else readable(shortcut, 64)
    strides = *x.stride()[:2], *other.stride()[:2]
    launch = mlp_launch(
        batch, tokens, channels, fc1_weight.shape[0], strides, x.dtype, shortcut is not None, scale is not None
    )
    with on_device(x):
        launch(
            x, fc1_weight.contiguous(), fc1_bias.contiguous(), fc2_weight.contiguous(), fc2_bias.contiguous(), other,
            fc2_bias if scale is None else scale.contiguous(), y,
        )  # fmt: skip
    return y


def gelu_backward_(h: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn h (..., hidden) into gelu(h) and grad, the gradient of that, into the gradient of h, both in place.

    Args:
        h: Before the GELU (exact, by erf). grad: Of its shape and dtype; both contiguous.
        dtype: Of the result.

    Returns:
        The sum of the gradient of h over all but the last axis, (hidden,): the gradient of fc1's bias.
    """
    hidden = h.shape[-1]
    if h.numel() == 0:
        return torch.zeros(hidden, dtype=dtype, device=h.device)
    total = torch.empty(hidden, dtype=dtype, device=h.device)
    launch, splits = gelu_backward_launch(h.numel() // hidden, hidden, h.dtype)
    parts = fp32_like(h, splits, hidden)
    with on_device(h):
        launch(h, grad, parts)
        reduce_parts(parts, total, total)
    return total
