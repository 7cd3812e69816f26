from types import ModuleType

import pytest
import torch

# mmcv 2.1 has no line_nms yet, and later ones hand the call on unchanged: the op is called directly.
ROWS = 72


def lines(*specs: tuple[int, int, float]) -> torch.Tensor:
    """Straight lines from (first row, number of rows, x)."""
    out = torch.zeros(len(specs), 5 + ROWS)
    for line, (start, length, x) in zip(out, specs, strict=True):
        line[2], line[4], line[5:] = start / (ROWS - 1), length, x
    return out


def test_near_lines_go(stand_in: ModuleType) -> None:
    given = lines((0, 72, 100.0), (0, 72, 104.0), (0, 72, 200.0), (10, 30, 203.0), (60, 10, 101.0))
    scores = torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6])
    keep, number, parent = stand_in.line_nms_forward(given, scores, overlap=5.0, top_k=10)
    assert keep[:number].tolist() == [1, 2]
    assert parent.tolist() == [1, 1, 2, 2, 1]
    assert keep[number:].sum() == 0 and keep.shape == (5,)


def test_lines_without_a_common_row_are_never_near(stand_in: ModuleType) -> None:
    given = lines((0, 20, 100.0), (20, 20, 100.0), (19, 5, 100.0))
    keep, number, _ = stand_in.line_nms_forward(given, torch.tensor([0.9, 0.8, 0.7]), overlap=50.0, top_k=10)
    assert keep[:number].tolist() == [0, 1]  # the third shares row 19 with the first


def test_limit_and_nothing(stand_in: ModuleType) -> None:
    given = lines(*[(0, 72, 100.0 * i) for i in range(6)])
    keep, number, _ = stand_in.line_nms_forward(given, torch.arange(6.0), overlap=5.0, top_k=4)
    assert keep[:number].tolist() == [5, 4, 3, 2]
    keep, number, parent = stand_in.line_nms_forward(given[:0], torch.zeros(0), overlap=5.0, top_k=4)
    assert number == 0 and keep.shape == parent.shape == (0,)
    with pytest.raises(ValueError, match='77'):
        stand_in.line_nms_forward(given[:, :50], torch.arange(6.0), overlap=5.0, top_k=4)
