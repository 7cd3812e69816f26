"""The pieces of mmcv's SyncBatchNorm ('MMSyncBN'), which is synchronised in Python between them."""

from torch import Tensor

from mila_mm.compat.mmcv_ext.common import hand_over


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write the mean of every channel into ``mean``.

    Args:
        input: (B, C, S).
        mean: (C,) float32.
    """
    mean.copy_(input.float().mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write the mean square distance of every channel from ``mean`` into ``var``.

    Args:
        input: (B, C, S).
        mean: (C,) float32, of all processes.
        var: (C,) float32.
    """
    var.copy_((input.float() - mean[:, None]).square_().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Normalise, scale and shift, and move the running statistics.

    Args:
        input: (B, C, S).
        mean: (C,) float32, of all processes.
        var: (C,) float32, biased, of all processes.
        weight: (C,).
        bias: (C,).
        running_mean: (C,), updated.
        running_var: (C,), updated with the unbiased variance.
        norm: (B, C, S) float32, output: what is normalised, before weight and bias.
        std: (C,) float32, output.
        output: (B, C, S).
        eps: Added to the variance.
        momentum: Weight of the new statistics.
        group_size: Number of processes.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input.float() - mean[:, None]) / std[:, None])
    hand_over(output, norm * weight.float()[:, None] + bias.float()[:, None])
    count = input.shape[0] * input.shape[2] * group_size
    unbiased = var * (count / (count - 1)) if count > 1 else var
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.copy_(momentum * new + (1 - momentum) * running)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Write the gradients by weight and bias.

    Args:
        grad_output: (B, C, S).
        norm: (B, C, S) float32, as the forward left it.
        grad_weight: (C,), output.
        grad_bias: (C,), output.
    """
    grad = grad_output.float()
    grad_weight.copy_((grad * norm).sum((0, 2)))
    grad_bias.copy_(grad.sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Write the gradient by the input.

    Args:
        grad_output: (B, C, S).
        weight: (C,).
        grad_weight: (C,), mean over the processes.
        grad_bias: (C,), mean over the processes.
        norm: (B, C, S) float32, as the forward left it.
        std: (C,) float32, as the forward left it.
        grad_input: (B, C, S), output.
    """
    count = max(grad_output.shape[0] * grad_output.shape[2], 1)
    common = (grad_weight[:, None] * norm + grad_bias[:, None]) / count
    result = (grad_output.float() - common) * (weight / std)[:, None]
    hand_over(grad_input, result)
