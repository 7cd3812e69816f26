"""``column_sum`` and ``layer_norm`` from plain operators: the specification that the kernels equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.common import as_written, compute_dtype


def column_sum_reference(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum x (..., C) over all but its last axis to (C,), in fp64 for fp64, else in fp32; of ``dtype`` or x's."""
    return x.reshape(-1, x.shape[-1]).sum(0, dtype=compute_dtype(x)).to(x.dtype if dtype is None else dtype)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """LayerNorm of x (B, N, C) with weight and bias (C,), in fp64 for fp64, else in fp32; of ``dtype`` or x's."""
    compute = compute_dtype(x)
    with as_written(x):
        y = F.layer_norm(x.to(compute), x.shape[-1:], weight.to(compute), bias.to(compute), eps)
    return y.to(x.dtype if dtype is None else dtype)
