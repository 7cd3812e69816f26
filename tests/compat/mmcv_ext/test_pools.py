import math

import numpy as np
import pytest
import torch
from mmcv.ops import DeformRoIPoolPack, ModulatedDeformRoIPoolPack, PrRoIPool, border_align, deform_roi_pool, roi_align

ROIS = torch.tensor([
    [0, 2.0, 4.0, 18.0, 17.0],  # inside
    [1, -9.0, -7.0, 9.0, 6.0],  # over the upper left corner
    [1, 15.0, 12.0, 60.0, 50.0],  # over the lower right corner
    [0, 200.0, 200.0, 240.0, 260.0],  # outside
    [1, 8.0, 8.0, 9.0, 9.0],  # one pixel
    [0, 7.0, 5.0, 7.0, 5.0],  # no area
], dtype=torch.double)  # fmt: skip


def surface(plane: np.ndarray, y: float, x: float) -> float:
    """Bilinear sample with the border rule of RoIAlign."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    near_y, near_x = np.maximum(0, 1 - abs(np.arange(height) - y)), np.maximum(0, 1 - abs(np.arange(width) - x))
    return float(near_y @ plane @ near_x)


def deform_roi_pool_by_loops(
    maps: np.ndarray,
    rois: np.ndarray,
    offset: np.ndarray,
    size: tuple[int, int],
    scale: float,
    ratio: int,
    gamma: float,
) -> np.ndarray:
    out = np.zeros((len(rois), maps.shape[1], *size))
    for r, (image, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (c * scale - 0.5 for c in corners)
        bin_h, bin_w = (y2 - y1) / size[0], (x2 - x1) / size[1]
        down, across = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for c, i, j in np.ndindex(out.shape[1:]):
            left, top = x1 + gamma * (x2 - x1) * offset[r, 0, i, j], y1 + gamma * (y2 - y1) * offset[r, 1, i, j]
            samples = [
                surface(
                    maps[int(image), c], top + (i + (a + 0.5) / down) * bin_h, left + (j + (b + 0.5) / across) * bin_w
                )
                for a in range(down)
                for b in range(across)
            ]
            out[r, c, i, j] = sum(samples) / max(len(samples), 1)
    return out


@pytest.mark.parametrize('ratio', [0, 2])
def test_deform_roi_pool_equals_loops(ratio: int) -> None:
    maps, offset = torch.randn(2, 3, 11, 13, dtype=torch.double), torch.randn(6, 2, 3, 2, dtype=torch.double)
    expected = deform_roi_pool_by_loops(maps.numpy(), ROIS.numpy(), offset.numpy(), (3, 2), 0.5, ratio, 0.1)
    pooled = deform_roi_pool(maps, ROIS, offset, (3, 2), 0.5, ratio, 0.1)
    torch.testing.assert_close(pooled, torch.from_numpy(expected))


@pytest.mark.parametrize('ratio', [0, 2])
def test_deform_roi_pool_without_offsets_is_roi_align(ratio: int) -> None:
    maps = torch.randn(2, 3, 11, 13, dtype=torch.double)
    torch.testing.assert_close(
        deform_roi_pool(maps, ROIS, None, (3, 2), 0.5, ratio), roi_align(maps, ROIS, (3, 2), 0.5, ratio)
    )


@pytest.mark.parametrize('ratio', [0, 2])
def test_deform_roi_pool_gradient(ratio: int) -> None:
    maps = torch.randn(2, 2, 11, 13, dtype=torch.double, requires_grad=True)
    offset = torch.randn(6, 2, 3, 2, dtype=torch.double, requires_grad=True)
    pool = lambda m, o: deform_roi_pool(m, ROIS, o, (3, 2), 0.5, ratio, 0.1)  # noqa: E731
    assert torch.autograd.gradcheck(pool, (maps, offset), fast_mode=True)
    pool(maps, None).sum().backward()


def test_deform_roi_pool_in_short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.compat.mmcv_ext import pools

    maps, offset = torch.randn(2, 3, 11, 13, dtype=torch.double), torch.randn(6, 2, 3, 2, dtype=torch.double)
    at_once = deform_roi_pool(maps, ROIS, offset, (3, 2), 0.5)
    monkeypatch.setattr(pools, 'SAMPLES_AT_ONCE', 10)
    torch.testing.assert_close(deform_roi_pool(maps, ROIS, offset, (3, 2), 0.5), at_once)


@pytest.mark.parametrize('kind', [DeformRoIPoolPack, ModulatedDeformRoIPoolPack])
def test_packs_train(kind: type) -> None:
    layer = kind((3, 3), 4, deform_fc_channels=8, spatial_scale=0.5)
    maps = torch.randn(2, 4, 11, 13, requires_grad=True)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    layer(maps, ROIS.float()).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_deform_roi_pool_of_nothing() -> None:
    maps, offset = torch.randn(2, 4, 11, 13, requires_grad=True), torch.zeros(0, 2, 3, 3)
    for given in (offset, None):
        pooled = deform_roi_pool(maps, torch.zeros(0, 5), given, (3, 3), 0.5)
        assert pooled.shape == (0, 4, 3, 3)
        assert torch.autograd.grad(pooled.sum(), maps)[0].abs().sum() == 0


def border_align_by_loops(maps: np.ndarray, boxes: np.ndarray, steps: int) -> np.ndarray:
    batch, channels = maps.shape[0], maps.shape[1] // 4
    out = np.zeros((batch, channels, boxes.shape[1], 4))
    for b, c, n, side in np.ndindex(out.shape):
        x1, y1, x2, y2 = boxes[b, n]
        corner, way = [((x1, y1), (x2, y1)), ((x1, y1), (x1, y2)), ((x2, y2), (x1, y2)), ((x2, y2), (x2, y1))][side]
        line = [np.array(corner) + (np.array(way) - np.array(corner)) * i / steps for i in range(steps + 1)]
        out[b, c, n, side] = max(surface(maps[b, side * channels + c], y, x) for x, y in line)
    return out


def test_border_align() -> None:
    maps = torch.randn(2, 12, 6, 7, dtype=torch.double, requires_grad=True)
    corner = torch.rand(2, 9, 2, dtype=torch.double) * 8 - 2
    boxes = torch.cat((corner, corner + torch.rand(2, 9, 2, dtype=torch.double) * 5), -1)
    boxes[0, 0] = torch.tensor([3.0, 2.0, 3.0, 2.0])  # a point
    boxes[1, 1] = torch.tensor([50.0, 50.0, 60.0, 60.0])  # outside
    expected = border_align_by_loops(maps.detach().numpy(), boxes.numpy(), 4)
    torch.testing.assert_close(border_align(maps, boxes, 4).detach(), torch.from_numpy(expected))
    assert torch.autograd.gradcheck(lambda m: border_align(m, boxes, 4), maps, fast_mode=True)
    assert border_align(maps, boxes[:, :0], 4).shape == (2, 3, 0, 4)


def precise_pool(maps: torch.Tensor, rois: torch.Tensor, size: tuple[int, int], scale: float) -> torch.Tensor:
    """Mean of the bilinear surface over each bin by the midpoint rule on a fine grid, differentiable."""
    fine = 400
    out = []
    for roi in rois:
        x1, y1, x2, y2 = roi[1:] * scale
        y = y1 + (y2 - y1) * (torch.arange(fine * size[0], dtype=maps.dtype) + 0.5) / (fine * size[0])
        x = x1 + (x2 - x1) * (torch.arange(fine * size[1], dtype=maps.dtype) + 0.5) / (fine * size[1])
        near_y = (1 - (y[:, None] - torch.arange(maps.shape[2])).abs()).clamp(min=0).view(size[0], fine, -1).mean(1)
        near_x = (1 - (x[:, None] - torch.arange(maps.shape[3])).abs()).clamp(min=0).view(size[1], fine, -1).mean(1)
        out.append(torch.einsum('ih,chw,jw->cij', near_y, maps[int(roi[0])], near_x))
    return torch.stack(out)


def test_prroi_pool_is_the_mean_of_the_surface() -> None:
    maps, rois = torch.randn(2, 3, 11, 13, requires_grad=True), (ROIS[:5] + 0.37).float()
    rois[:, 0] = ROIS[:5, 0]
    rois.requires_grad_()
    pooled = PrRoIPool((3, 2), 0.5)(maps, rois)
    reference = precise_pool(maps.double(), rois.double(), (3, 2), 0.5)
    torch.testing.assert_close(pooled.double(), reference, rtol=1e-3, atol=1e-3)
    direction = torch.randn_like(pooled)
    got = torch.autograd.grad(pooled, (maps, rois), direction)
    expected = torch.autograd.grad(reference, (maps, rois), direction.double())
    torch.testing.assert_close(got[0], expected[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[1], expected[1], rtol=2e-2, atol=2e-2)


def test_prroi_pool_of_points_and_nothing() -> None:
    maps = torch.randn(2, 3, 11, 13, requires_grad=True)
    pooled = PrRoIPool((3, 2), 0.5)(maps, ROIS[5:].float())
    assert pooled.abs().sum() == 0
    pooled.sum().backward()
    assert maps.grad.abs().sum() == 0
    assert PrRoIPool((3, 2), 0.5)(maps, torch.zeros(0, 5)).shape == (0, 3, 3, 2)
