"""``batch_norm`` from plain operators: the specification that the kernels equal."""

from __future__ import annotations

import torch
from torch import Tensor

from mila_mm.ops.common import as_written, compute_dtype


def batch_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, relu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of x (B, N, C) by its own statistics with weight and bias (C,), and ReLU, in fp64 for fp64, else fp32.

    Returns y in x's dtype, and mean and variance over B and N, (C,), the latter over the number of values.
    """
    compute = compute_dtype(x)
    with as_written(x):
        wide = x.to(compute)
        variance, mean = torch.var_mean(wide, (0, 1), correction=0)
        y = (wide - mean) * ((variance + eps).rsqrt() * weight.to(compute)) + bias.to(compute)
        y = torch.relu(y) if relu else y
    return y.to(x.dtype), mean, variance
