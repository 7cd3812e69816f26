import math

import numpy as np
import pytest
import torch
from mmcv.ops import RoIAlign, RoIPool, roi_align, roi_pool

# image index, x1, y1, x2, y2 at twice the resolution of an 11 x 13 map
ROIS = torch.tensor([
    [0, 2.0, 4.0, 18.0, 17.0],  # inside
    [1, -9.0, -7.0, 9.0, 6.0],  # over the upper left corner
    [1, 15.0, 12.0, 60.0, 50.0],  # over the lower right corner
    [0, 200.0, 200.0, 240.0, 260.0],  # outside
    [1, 8.0, 8.0, 9.0, 9.0],  # one pixel
    [0, 7.0, 5.0, 7.0, 5.0],  # no area
    [0, 0.0, 0.0, 26.0, 22.0],  # the whole map
])  # fmt: skip
EMPTY = torch.zeros(0, 5)


def surface(plane: np.ndarray, y: float, x: float) -> float:
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = math.floor(y), math.floor(x)
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    fy, fx = y - top, x - left
    upper = plane[top, left] * (1 - fx) + plane[top, right] * fx
    lower = plane[below, left] * (1 - fx) + plane[below, right] * fx
    return upper * (1 - fy) + lower * fy


def roi_align_by_loops(
    maps: np.ndarray, rois: np.ndarray, size: tuple[int, int], scale: float, ratio: int, mode: str, aligned: bool
) -> np.ndarray:
    out = np.zeros((len(rois), maps.shape[1], *size))
    for r, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (c * scale - 0.5 * aligned for c in corners)
        high, wide = y2 - y1, x2 - x1
        if not aligned:
            high, wide = max(high, 1.0), max(wide, 1.0)
        bin_h, bin_w = high / size[0], wide / size[1]
        down, across = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for c, i, j in np.ndindex(out.shape[1:]):
            samples = [
                surface(maps[int(image), c], y1 + (i + (a + 0.5) / down) * bin_h, x1 + (j + (b + 0.5) / across) * bin_w)
                for a in range(down)
                for b in range(across)
            ]
            if samples:
                out[r, c, i, j] = max(samples) if mode == 'max' else sum(samples) / len(samples)
    return out


def roi_pool_by_loops(maps: np.ndarray, rois: np.ndarray, size: tuple[int, int], scale: float) -> np.ndarray:
    height, width = maps.shape[2:]
    out = np.zeros((len(rois), maps.shape[1], *size))
    for r, (image, *first, last_x, last_y) in enumerate(rois):
        x1, y1, x2, y2 = (c * scale for c in (*first, last_x + 1, last_y + 1))
        for i, j in np.ndindex(*size):
            if x2 <= x1 or y2 <= y1:
                continue
            top = min(max(math.floor(y1 + i * (y2 - y1) / size[0]), 0), height)
            end = min(max(math.ceil(y1 + (i + 1) * (y2 - y1) / size[0]), 0), height)
            left = min(max(math.floor(x1 + j * (x2 - x1) / size[1]), 0), width)
            right = min(max(math.ceil(x1 + (j + 1) * (x2 - x1) / size[1]), 0), width)
            window = maps[int(image), :, top:end, left:right]
            if window.size:
                out[r, :, i, j] = window.max((1, 2))
    return out


@pytest.mark.parametrize('aligned', [True, False], ids=['aligned', 'legacy'])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_equals_loops(mode: str, ratio: int, aligned: bool) -> None:
    maps = torch.randn(2, 3, 11, 13)
    expected = roi_align_by_loops(maps.double().numpy(), ROIS.double().numpy(), (3, 2), 0.5, ratio, mode, aligned)
    pooled = roi_align(maps, ROIS, (3, 2), 0.5, ratio, mode, aligned)
    torch.testing.assert_close(pooled, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('aligned', [True, False], ids=['aligned', 'legacy'])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_gradient(mode: str, ratio: int, aligned: bool) -> None:
    maps = torch.randn(2, 2, 6, 5, dtype=torch.double, requires_grad=True)
    rois = ROIS.double()
    rois[:, 1:] = rois[:, 1:] * 0.4 + 0.1
    assert torch.autograd.gradcheck(lambda m: roi_align(m, rois, (2, 3), 0.5, ratio, mode, aligned), maps)


@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_of_nothing(mode: str) -> None:
    maps = torch.randn(2, 3, 6, 5, requires_grad=True)
    pooled = roi_align(maps, EMPTY, (7, 7), 0.25, 0, mode)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert torch.equal(maps.grad, torch.zeros_like(maps))


@pytest.mark.parametrize('mode', ['avg', 'max'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_roi_align_in_half_precision(dtype: torch.dtype, mode: str) -> None:
    maps = torch.randn(2, 3, 11, 13).to(dtype).requires_grad_()
    rois = ROIS.to(dtype)
    pooled = roi_align(maps, rois, (3, 2), 0.5, 2, mode)
    exact = maps.detach().double().requires_grad_()
    reference = roi_align(exact, rois.double(), (3, 2), 0.5, 2, mode)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled.double(), reference, rtol=1e-2, atol=1e-2)
    pooled.sum().backward()
    reference.sum().backward()
    torch.testing.assert_close(maps.grad.double(), exact.grad, rtol=2e-2, atol=2e-2)


def test_roi_align_under_autocast_and_from_strided_maps() -> None:
    maps = torch.randn(2, 3, 11, 13)
    plain = roi_align(maps, ROIS, (3, 2), 0.5)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(roi_align(maps, ROIS, (3, 2), 0.5), plain)
    last = maps.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(roi_align(last, ROIS, (3, 2), 0.5), plain)
    wide = torch.randn(2, 6, 11, 13)
    torch.testing.assert_close(
        roi_align(wide[:, ::2], ROIS, (3, 2), 0.5), roi_align(wide[:, ::2].clone(), ROIS, (3, 2), 0.5)
    )


@pytest.mark.parametrize('ratio', [0, 3])
def test_average_gradient_equals_that_of_torchvision(ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    from mila_mm.compat.mmcv_ext import roi_taps

    side = torch.tensor([1.0, 0.0, 300.0, 40.0, 4.0, 4.0, 260.0, 7.0]).repeat(4)
    corner = torch.rand(32, 2) * 60 - 10
    rois = torch.cat((torch.randint(0, 2, (32, 1)), corner, corner + torch.stack((side, side.flip(0)), 1)), 1)
    grads = []
    for pool in (roi_align, torchvision.ops.roi_align):
        maps = torch.randn(2, 3, 15, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
        options = (rois, (4, 3), 0.25, ratio) if pool is roi_align else (rois, (4, 3), 0.25, ratio, True)
        pool(maps, *options).square().sum().backward()
        grads.append(maps.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(roi_taps, 'SAMPLES_AT_ONCE', 100)
    maps = torch.randn(2, 3, 15, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
    roi_align(maps, rois, (4, 3), 0.25, ratio).square().sum().backward()
    torch.testing.assert_close(maps.grad, grads[1], rtol=1e-4, atol=1e-4)


def test_max_mode_in_short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.compat.mmcv_ext import roi

    maps = torch.randn(2, 3, 11, 13)
    at_once = roi_align(maps, ROIS, (3, 2), 0.5, 0, 'max')
    monkeypatch.setattr(roi, 'POINTS_AT_ONCE', 60)
    assert torch.equal(roi_align(maps, ROIS, (3, 2), 0.5, 0, 'max'), at_once)


@pytest.mark.parametrize('scale', [0.5, 0.31, 1.0])
def test_roi_pool_equals_loops(scale: float) -> None:
    maps = torch.randn(2, 3, 11, 13)
    expected = roi_pool_by_loops(maps.double().numpy(), ROIS.double().numpy(), (3, 2), scale)
    torch.testing.assert_close(roi_pool(maps, ROIS, (3, 2), scale), torch.from_numpy(expected).float())


def test_roi_pool_gradient() -> None:
    maps = torch.randn(2, 2, 11, 13, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: roi_pool(m, ROIS.double(), (3, 2), 0.5), maps)


def test_roi_pool_of_negative_extent_gives_no_gradient() -> None:
    maps = torch.ones(1, 1, 4, 4, requires_grad=True)
    pooled = roi_pool(maps, torch.tensor([[0.0, 3.0, 3.0, 0.0, 0.0]]), (1, 1), 1.0)
    pooled.sum().backward()
    assert pooled.item() == 0 and maps.grad.abs().sum() == 0


def test_roi_pool_of_nothing_and_in_half_precision() -> None:
    maps = torch.randn(2, 3, 11, 13)
    assert roi_pool(maps, EMPTY, (3, 2), 0.5).shape == (0, 3, 3, 2)
    half = roi_pool(maps.half(), ROIS.half(), (3, 2), 0.5)
    torch.testing.assert_close(half, roi_pool(maps.half().float(), ROIS, (3, 2), 0.5).half())


@pytest.mark.parametrize('mode', ['avg', 'max'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_boxes_that_are_not_finite(value: float, mode: str) -> None:
    # torchvision's CPU kernel ends the process on them.
    maps = torch.randn(2, 3, 11, 13, requires_grad=True)
    rois = ROIS.clone()
    rois[1, 3] = value
    pooled = roi_align(maps, rois, (3, 2), 0.5, 0, mode)
    others = [0, 2, 3, 4, 5, 6]
    assert torch.equal(pooled[others], roi_align(maps, ROIS[others], (3, 2), 0.5, 0, mode))
    assert mode == 'max' or pooled[1].isnan().all()
    pooled.nansum().backward()


def test_modules() -> None:
    maps = torch.randn(2, 3, 11, 13)
    assert torch.equal(RoIAlign((3, 2), 0.5)(maps, ROIS), roi_align(maps, ROIS, (3, 2), 0.5))
    torchvision_path = RoIAlign((3, 2), 0.5, use_torchvision=True)(maps, ROIS)
    torch.testing.assert_close(RoIAlign((3, 2), 0.5)(maps, ROIS), torchvision_path)
    assert torch.equal(RoIPool((3, 2), 0.5)(maps, ROIS), roi_pool(maps, ROIS, (3, 2), 0.5))
