import numpy as np
import pytest
import torch
from mmcv.ops import SigmoidFocalLoss, sigmoid_focal_loss, softmax_focal_loss

CLASSES = 5


def sigmoid_focal_by_definition(
    x: np.ndarray, target: np.ndarray, gamma: float, alpha: float, weight: np.ndarray | None
) -> np.ndarray:
    out = np.zeros_like(x)
    for n, c in np.ndindex(x.shape):
        log_p, log_q = -np.logaddexp(0, -x[n, c]), -np.logaddexp(0, x[n, c])
        if target[n] == c:
            out[n, c] = -alpha * np.exp(gamma * log_q) * log_p
        else:
            out[n, c] = -(1 - alpha) * np.exp(gamma * log_p) * log_q
        if weight is not None and 0 <= target[n] < x.shape[1]:
            out[n, c] *= weight[target[n]]
    return out


def softmax_focal_by_definition(
    x: np.ndarray, target: np.ndarray, gamma: float, alpha: float, weight: np.ndarray | None
) -> np.ndarray:
    out = np.zeros(len(x))
    for n, t in enumerate(target):
        p = np.exp(x[n, t] - x[n].max()) / np.exp(x[n] - x[n].max()).sum()
        out[n] = -alpha * (1 - p) ** gamma * np.log(p) * (1 if weight is None else weight[t])
    return out


def logits_and_targets(
    rows: int, background: bool, dtype: torch.dtype = torch.double
) -> tuple[torch.Tensor, torch.Tensor]:
    targets = torch.arange(rows) % (CLASSES + background)
    return (torch.randn(rows, CLASSES, dtype=dtype) * 3).requires_grad_(), targets


@pytest.mark.parametrize('weighted', [False, True], ids=['plain', 'weighted'])
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (1.5, 0.75), (0.0, 0.5)])
def test_sigmoid_focal_loss(gamma: float, alpha: float, weighted: bool) -> None:
    x, target = logits_and_targets(13, background=True)
    weight = torch.rand(CLASSES, dtype=torch.double) + 0.5 if weighted else None
    loss = sigmoid_focal_loss(x, target, gamma, alpha, weight, 'none')
    expected = sigmoid_focal_by_definition(
        x.detach().numpy(), target.numpy(), gamma, alpha, weight.numpy() if weighted else None
    )
    torch.testing.assert_close(loss.detach(), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda v: sigmoid_focal_loss(v, target, gamma, alpha, weight, 'sum'), x)


@pytest.mark.parametrize('weighted', [False, True], ids=['plain', 'weighted'])
@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (1.0, 1.0), (0.5, 0.5)])
def test_softmax_focal_loss(gamma: float, alpha: float, weighted: bool) -> None:
    x, target = logits_and_targets(13, background=False)
    weight = torch.rand(CLASSES, dtype=torch.double) + 0.5 if weighted else None
    loss = softmax_focal_loss(x, target, gamma, alpha, weight, 'none')
    expected = softmax_focal_by_definition(
        x.detach().numpy(), target.numpy(), gamma, alpha, weight.numpy() if weighted else None
    )
    torch.testing.assert_close(loss.detach(), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda v: softmax_focal_loss(v, target, gamma, alpha, weight, 'mean'), x)


def test_reductions() -> None:
    x, target = logits_and_targets(7, background=True)
    each = sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'none')
    torch.testing.assert_close(sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'sum'), each.sum())
    torch.testing.assert_close(sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'mean'), each.sum() / 7)
    torch.testing.assert_close(SigmoidFocalLoss(2.0, 0.25)(x, target), each.sum() / 7)


def test_extreme_logits_stay_finite_and_exact() -> None:
    x = torch.tensor([[200.0, -200.0, 30.0, -30.0, 0.0]], requires_grad=True)
    loss = sigmoid_focal_loss(x, torch.tensor([1]), 2.0, 0.25, None, 'none')
    expected = sigmoid_focal_by_definition(x.detach().double().numpy(), np.array([1]), 2.0, 0.25, None)
    torch.testing.assert_close(loss.detach().double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-12)
    loss.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[0, 0] > 0.7 and x.grad[0, 1] < -0.2
    certain = torch.tensor([[60.0, -60.0]], requires_grad=True)
    softmax_focal_loss(certain, torch.tensor([0]), 0.5).backward()
    assert torch.isfinite(certain.grad).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, target = logits_and_targets(13, background=True, dtype=torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    loss = sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'none')
    assert loss.dtype == dtype
    expected = sigmoid_focal_by_definition(x.detach().double().numpy(), target.numpy(), 2.0, 0.25, None)
    torch.testing.assert_close(loss.double(), torch.from_numpy(expected), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize('loss', [sigmoid_focal_loss, softmax_focal_loss])
def test_no_rows(loss: object) -> None:
    x = torch.zeros(0, CLASSES, requires_grad=True)
    total = loss(x, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, 'sum')
    total.backward()
    assert total.item() == 0 and x.grad.shape == (0, CLASSES)
