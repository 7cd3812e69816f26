from types import ModuleType

import numpy as np
import pytest
import torch
from mmcv.ops import CARAFEPack, carafe, carafe_naive

CASES = [(3, 1, 2), (5, 2, 2), (1, 1, 1), (3, 2, 3), (7, 1, 2)]  # kernel, groups, scale


def carafe_by_loops(maps: np.ndarray, masks: np.ndarray, kernel: int, groups: int, scale: int) -> np.ndarray:
    batch, channels, height, width = maps.shape
    out = np.zeros((batch, channels, height * scale, width * scale))
    for b, c, y, x in np.ndindex(out.shape):
        group = c // (channels // groups)
        for i, j in np.ndindex(kernel, kernel):
            row, column = y // scale + i - kernel // 2, x // scale + j - kernel // 2
            if 0 <= row < height and 0 <= column < width:
                out[b, c, y, x] += maps[b, c, row, column] * masks[b, group * kernel**2 + i * kernel + j, y, x]
    return out


def operands(kernel: int, groups: int, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    maps = torch.randn(2, 4, 3, 5, dtype=torch.double, requires_grad=True)
    masks = torch.rand(2, groups * kernel**2, 3 * scale, 5 * scale, dtype=torch.double, requires_grad=True)
    return maps, masks


@pytest.mark.parametrize('case', CASES)
def test_values(case: tuple[int, int, int]) -> None:
    maps, masks = operands(*case)
    expected = torch.from_numpy(carafe_by_loops(maps.detach().numpy(), masks.detach().numpy(), *case))
    torch.testing.assert_close(carafe(maps, masks, *case).detach(), expected)
    torch.testing.assert_close(carafe_naive(maps, masks, *case).detach(), expected)


@pytest.mark.parametrize('case', CASES)
def test_gradients(case: tuple[int, int, int], stand_in: ModuleType) -> None:
    maps, masks = operands(*case)
    assert torch.autograd.gradcheck(lambda m, k: carafe(m, k, *case), (maps, masks), fast_mode=True)
    # carafe_naive's Python accepts gradients on CUDA only: its op is called directly.
    out = carafe(maps, masks, *case)
    direction = torch.randn_like(out)
    expected = torch.autograd.grad(out, (maps, masks), direction)
    got = torch.zeros_like(maps), torch.zeros_like(masks)
    stand_in.carafe_naive_backward(direction, maps.detach(), masks.detach(), *got, *case)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_channels_last_half_precision_and_no_images() -> None:
    maps, masks = (t.detach().float() for t in operands(5, 2, 2))
    plain = carafe(maps, masks, 5, 2, 2)
    last = maps.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(carafe(last, masks, 5, 2, 2), plain)
    half = carafe(maps.half(), masks.half(), 5, 2, 2)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), plain, rtol=1e-2, atol=1e-2)
    assert carafe(maps[:0], masks[:0], 5, 2, 2).shape == (0, 4, 6, 10)


def test_pack_trains_under_autocast() -> None:
    layer = CARAFEPack(8, 2, compressed_channels=4)
    maps = torch.randn(2, 8, 3, 5, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(maps)
    assert out.shape == (2, 8, 6, 10)
    out.float().square().sum().backward()
    assert maps.grad.abs().sum() > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
