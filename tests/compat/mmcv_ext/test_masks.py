import numpy as np
import pytest
import torch
from mmcv.ops import MaskedConv2d, PSAMask, masked_conv2d


def psamask_by_loops(windows: np.ndarray, kind: str, mask_size: tuple[int, int]) -> np.ndarray:
    batch, _, height, width = windows.shape
    out = np.zeros((batch, height * width, height, width))
    half = [(n - 1) // 2 for n in mask_size]
    for b, h, w, i, j in np.ndindex(batch, height, width, *mask_size):
        y, x = h + i - half[0], w + j - half[1]
        if 0 <= y < height and 0 <= x < width:
            value = windows[b, i * mask_size[1] + j, h, w]
            if kind == 'collect':
                out[b, y * width + x, h, w] = value
            else:
                out[b, h * width + w, y, x] = value
    return out


@pytest.mark.parametrize('mask_size', [(3, 5), (7, 9), (1, 1), (4, 4)])
@pytest.mark.parametrize('kind', ['collect', 'distribute'])
def test_psamask(kind: str, mask_size: tuple[int, int]) -> None:
    windows = torch.randn(2, mask_size[0] * mask_size[1], 4, 5, dtype=torch.double, requires_grad=True)
    layer = PSAMask(kind, mask_size)
    expected = psamask_by_loops(windows.detach().numpy(), kind, mask_size)
    assert torch.equal(layer(windows).detach(), torch.from_numpy(expected))
    assert torch.autograd.gradcheck(layer, windows, fast_mode=True)


def test_psamask_of_no_images_and_in_half_precision() -> None:
    layer = PSAMask('collect', (3, 3))
    assert layer(torch.zeros(0, 9, 4, 5)).shape == (0, 20, 4, 5)
    windows = torch.randn(1, 9, 4, 5)
    assert torch.equal(layer(windows.half()), layer(windows).half())


@pytest.mark.parametrize(('kernel', 'padding'), [((3, 3), (1, 1)), ((3, 1), (1, 0)), ((1, 5), (0, 2))])
def test_masked_conv_is_the_convolution_where_the_mask_is_set(kernel: tuple, padding: tuple) -> None:
    maps, mask = torch.randn(1, 3, 6, 7), (torch.rand(1, 6, 7) > 0.5).float()
    weight, bias = torch.randn(5, 3, *kernel), torch.randn(5)
    everywhere = torch.nn.functional.conv2d(maps, weight, bias, padding=padding)
    torch.testing.assert_close(masked_conv2d(maps, mask, weight, bias, padding), everywhere * mask[None])


def test_masked_conv_of_an_empty_mask_and_the_module() -> None:
    layer, maps = MaskedConv2d(3, 5, 3, padding=1), torch.randn(1, 3, 6, 7)
    assert layer(maps, torch.zeros(1, 6, 7)).abs().sum() == 0
    torch.testing.assert_close(layer(maps, torch.ones(1, 6, 7)), layer(maps))
