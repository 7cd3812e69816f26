"""``mlp`` from plain operators: the specification that the kernels equal."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.common import as_written, compute_dtype


def mlp_reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    shortcut: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute the result of :func:`mlp` from plain operators, in fp64 for fp64 and in fp32 otherwise."""
    compute = compute_dtype(x)
    with as_written(x):
        hidden = F.gelu(F.linear(x.to(compute), fc1_weight.to(compute), fc1_bias.to(compute)))
        y = F.linear(hidden, fc2_weight.to(compute), fc2_bias.to(compute))
        y = y if scale is None else y * scale.to(compute)[:, None, None]
        y = y if shortcut is None else y + shortcut.to(compute)
    return y.to(x.dtype if shortcut is None else shortcut.dtype)
