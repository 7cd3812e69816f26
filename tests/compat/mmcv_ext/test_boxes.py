import pytest
import torch
from mmcv.ops import bbox_overlaps

A = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 5.0, 5.0], [-4.0, 2.0, 3.0, 9.0]])
B = torch.tensor([[5.0, 5.0, 15.0, 15.0], [20.0, 20.0, 30.0, 30.0], [0.0, 0.0, 10.0, 10.0], [2.0, 2.0, 3.0, 3.0]])


def overlap(a: list[float], b: list[float], mode: str, offset: int) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    area_a, area_b = ((v[2] - v[0] + offset) * (v[3] - v[1] + offset) for v in (a, b))
    base = area_a + area_b - width * height if mode == 'iou' else area_a
    return width * height / base if base else float('nan')


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('mode', ['iou', 'iof'])
def test_pairs(mode: str, offset: int) -> None:
    expected = torch.tensor([[overlap(a, b, mode, offset) for b in B.tolist()] for a in A.tolist()])
    torch.testing.assert_close(bbox_overlaps(A, B, mode, offset=offset), expected, equal_nan=True)
    torch.testing.assert_close(
        bbox_overlaps(A, B[:3], mode, aligned=True, offset=offset), expected[:, :3].diagonal(), equal_nan=True
    )


def test_nothing_and_half_precision() -> None:
    assert bbox_overlaps(A, torch.zeros(0, 4)).shape == (3, 0)
    half = bbox_overlaps(A.half(), B.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), bbox_overlaps(A, B), rtol=1e-3, atol=1e-3)
