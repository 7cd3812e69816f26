"""Whether a convolution computes as exactly as its dtype says."""

from __future__ import annotations

import torch
from torch import Tensor

from mila_mm.ops.common import autocast_dtype


@torch.compiler.assume_constant_result
def _cudnn_rounds() -> bool:
    """Whether cuDNN may round what an fp32 convolution takes to TF32, as it may unless told otherwise."""
    cudnn = torch.backends.cudnn
    # The old attribute may raise once the new one has been set, so the new one is asked wherever it exists.
    return cudnn.conv.fp32_precision == 'tf32' if hasattr(cudnn, 'conv') else cudnn.allow_tf32


def full_precision(x: Tensor) -> bool:
    """True where a convolution of x would compute in fp32 or fp64."""
    if autocast_dtype(x.device.type) is not None or (x.is_cuda and x.dtype == torch.float32 and _cudnn_rounds()):
        return False
    return x.dtype in (torch.float32, torch.float64)
