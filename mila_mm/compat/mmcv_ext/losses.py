"""Focal losses (Lin et al., 2017), elementwise, in plain PyTorch.

The logarithms come from softplus, so they stay exact where a probability rounds to 0 or 1; mmcv clamps
such probabilities at the smallest normal float32, which caps a loss at about 87.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mila_mm.compat.mmcv_ext.common import hand_over, widen


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the sigmoid focal loss of every logit into ``output``.

    With p = sigmoid(x): -alpha (1 - p)^gamma log(p) where the class is the target,
    -(1 - alpha) p^gamma log(1 - p) elsewhere.

    Args:
        input: (N, C) logits.
        target: (N,) int64 classes; any value outside 0 .. C - 1 is background.
        weight: (C,) factors by target class, or empty. Background counts 1.
        output: (N, C).
        gamma: Focusing exponent.
        alpha: Weight of the positives; the negatives get 1 - alpha.
    """
    x = widen(input)
    loss = torch.sigmoid(x).pow_(gamma).mul_(softplus(x)).mul_(1 - alpha)
    picked, inside, xt = _at_target(x, target)
    positive = alpha * torch.sigmoid(-xt).pow_(gamma) * softplus(-xt)
    hand_over(output, _finish(loss, picked, inside, positive, weight))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of every element of the sigmoid focal loss by its logit into ``grad_input``.

    The arguments that are not named here are those of the forward.

    Args:
        grad_input: (N, C), output.
    """
    x = widen(input)
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    grad = q.mul_(softplus(x)).mul_(gamma).add_(p).mul_(p.pow_(gamma)).mul_(1 - alpha)
    picked, inside, xt = _at_target(x, target)
    p, q = torch.sigmoid(xt), torch.sigmoid(-xt)
    positive = -alpha * q.pow(gamma) * (q + gamma * p * softplus(-xt))
    hand_over(grad_input, _finish(grad, picked, inside, positive, weight))


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the softmax focal loss -alpha (1 - p_t)^gamma log(p_t) of every row into ``output``.

    Args:
        input: (N, C) probabilities, the softmax already taken.
        target: (N,) int64 classes; a row whose class is outside 0 .. C - 1 costs nothing.
        weight: (C,) factors by target class, or empty.
        output: (N,).
        gamma: Focusing exponent.
        alpha: Weight.
    """
    p, factor = _target_probability(input, target, weight)
    hand_over(output, -alpha * (1 - p).pow_(gamma) * _safe_log(p) * factor)


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivatives of the rows' softmax focal losses by their logits into ``grad_input``.

    The arguments that are not named here are those of the forward.

    Args:
        buff: (N,), output: the derivative by log(p_t).
        grad_input: (N, C), output.
    """
    p, factor = _target_probability(input, target, weight)
    q = 1 - p
    # At p = 1 and gamma < 1 the second term is infinity times 0; its limit is 0.
    focus = torch.where(q > 0, gamma * q.pow(gamma - 1) * p * _safe_log(p), torch.zeros_like(p))
    by_log = alpha * (focus - q.pow(gamma)) * factor
    probability = widen(input)
    picked, inside, _ = _at_target(probability, target)
    one_hot = torch.zeros_like(probability).scatter_(1, picked, inside.to(probability.dtype))
    hand_over(buff, by_log)
    hand_over(grad_input, by_log[:, None] * one_hot.sub_(probability))


def _at_target(values: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Target columns (N, 1) made safe to index with, which of them are real, and the values there."""
    classes = values.shape[1]
    picked = target.clamp(0, classes - 1)[:, None]
    inside = ((target >= 0) & (target < classes))[:, None]
    return picked, inside, values.gather(1, picked)


def _finish(negative: Tensor, picked: Tensor, inside: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Put the target's column in its place among the others and apply the class weights."""
    merged = negative.scatter_(1, picked, torch.where(inside, positive, negative.gather(1, picked)))
    if weight.numel():
        factor = torch.where(inside, weight.to(merged.dtype)[picked], torch.ones_like(positive))
        merged.mul_(factor)
    return merged


def _target_probability(probability: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Probability (N,) of the target class, and the factor (N,) of its row: 0 without a target."""
    picked, inside, p = _at_target(widen(probability), target)
    factor = inside.to(p.dtype)
    if weight.numel():
        factor = factor * weight.to(p.dtype)[picked]
    return p[:, 0], factor[:, 0]


def _safe_log(p: Tensor) -> Tensor:
    return p.clamp(min=torch.finfo(p.dtype).tiny).log_()
