"""A BatchNorm in training mode and the ReLU behind it by their kernels, where the module is PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mila_mm.nn.plain import why_not_plain
from mila_mm.ops import why_not_triton_batch_norm
from mila_mm.ops.batch_norm.op import BatchNormNode
from mila_mm.ops.common import to_image, to_tokens


def fits(norm: nn.Module | None, x: Tensor) -> bool:
    """Whether :func:`run` computes what ``norm(x)`` would, of an image x (B, C, H, W).

    The norm has to be a plain ``nn.BatchNorm2d`` with parameters and running statistics in fp32, in training mode. What
    PyTorch refuses (a single value a channel, an eps of 0) is left to it, and so is ``momentum=None``, which reads the
    number of batches back from the GPU.
    """
    if why_not_plain('', norm, nn.BatchNorm2d) is not None:
        return False
    assert isinstance(norm, nn.BatchNorm2d)
    batch, channels, height, width = x.shape
    if not (norm.training and norm.track_running_stats) or norm.momentum is None or norm.eps <= 0:
        return False
    if norm.num_features != channels or batch * height * width < 2 or not _plain_tensors(norm, x.device):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and _by_triton(to_tokens(x))


def _plain_tensors(norm: nn.BatchNorm2d, device: torch.device) -> bool:
    """Whether a norm has what the kernels read and write, dense and on a device."""
    batches = norm.num_batches_tracked
    if type(norm.weight) is not nn.Parameter or type(norm.bias) is not nn.Parameter:
        return False
    if batches is None or batches.dtype != torch.int64 or batches.device != device:
        return False
    vectors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    return all(
        vector is not None and vector.dtype == torch.float32 and vector.device == device and vector.is_contiguous()
        for vector in vectors
    )


def _by_triton(x: Tensor) -> bool:
    """Whether the kernels serve tokens x (B, N, C)."""
    return why_not_triton_batch_norm(x) is None


def run(norm: nn.Module | None, x: Tensor, relu: bool) -> Tensor:
    """The norm of an image x (B, C, H, W) in channels_last, and ReLU if ``relu``; what :func:`fits` takes.

    Running statistics move as in ``norm(x)``: once each time that the forward runs, a recomputation included.
    """
    assert isinstance(norm, nn.BatchNorm2d)
    running = norm.running_mean, norm.running_var, norm.num_batches_tracked
    y = BatchNormNode.apply(to_tokens(x), norm.weight, norm.bias, running, norm.momentum, norm.eps, relu)
    return to_image(y, *x.shape[2:])
