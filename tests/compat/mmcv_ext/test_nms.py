import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.ops import batched_nms, nms, nms_match, soft_nms


def iou(a: np.ndarray, b: np.ndarray, offset: int = 0) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0.0)
    areas = [(v[2] - v[0] + offset) * (v[3] - v[1] + offset) for v in (a, b)]
    union = areas[0] + areas[1] - width * height
    return width * height / union if union else float('nan')


def nms_by_definition(boxes: np.ndarray, scores: np.ndarray, threshold: float, offset: int = 0) -> list[int]:
    kept: list[int] = []
    for i in np.argsort(-scores, kind='stable'):
        if not any(iou(boxes[i], boxes[k], offset) > threshold for k in kept):
            kept.append(int(i))
    return kept


def soft_nms_by_definition(
    boxes: np.ndarray, scores: np.ndarray, threshold: float, sigma: float, lowest: float, method: str, offset: int
) -> tuple[list[int], list[float]]:
    left = {i: float(s) for i, s in enumerate(scores)}
    order, final = [], []
    while left:
        best = max(left, key=left.__getitem__)
        order.append(best)
        final.append(left.pop(best))
        for i in list(left):
            overlap = iou(boxes[i], boxes[best], offset)
            if method == 'gaussian':
                left[i] *= np.exp(-overlap * overlap / sigma)
            elif overlap >= threshold:
                left[i] *= 1 - overlap if method == 'linear' else 0.0
            if left[i] < lowest:
                del left[i]
    return order, final


def some_boxes(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 40 - 5
    size = torch.rand(count, 2, generator=generator) * 20 + 1
    return torch.cat((corner, corner + size), 1), torch.randperm(count, generator=generator) / max(count, 1) + 0.01


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize('count', [1, 2, 63])
def test_nms_keeps_what_the_definition_keeps(count: int, threshold: float, offset: int) -> None:
    boxes, scores = some_boxes(count)
    dets, kept = nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == nms_by_definition(boxes.double().numpy(), scores.numpy(), threshold, offset)
    assert torch.equal(dets, torch.cat((boxes[kept], scores[kept, None]), 1))


def test_nms_threshold_is_compared_in_float32() -> None:
    # Intersection 1, union 10: an overlap of exactly 0.1 in float32 does not exceed a threshold of 0.1.
    boxes = torch.tensor([[0.0, 0.0, 1.0, 10.0], [0.0, 9.0, 1.0, 10.0]])
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.1)[1].tolist() == [0, 1]
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.0999)[1].tolist() == [0]


def test_nms_offset_counts_inclusive_pixels() -> None:
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 5.0, 9.0, 9.0]])  # 100 pixels and 50 of them
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.49, offset=1)[1].tolist() == [0]
    assert nms(boxes, scores, 0.49, offset=0)[1].tolist() == [0, 1]  # 36 / 81


def test_nms_filters_and_limits() -> None:
    boxes, scores = some_boxes(40)
    everything = nms(boxes, scores, 0.5)[1]
    assert nms(boxes, scores, 0.5, max_num=3)[1].tolist() == everything[:3].tolist()
    above = nms(boxes, scores, 0.5, score_threshold=0.4)[1]
    assert above.tolist() == [i for i in everything.tolist() if scores[i] > 0.4]


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_nms_in_other_dtypes(dtype: torch.dtype) -> None:
    boxes, scores = some_boxes(40)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    kept = nms(boxes, scores, 0.5)[1]
    assert kept.tolist() == nms_by_definition(boxes.double().numpy(), scores.double().numpy(), 0.5)


def test_nms_without_boxes_and_with_boxes_without_area() -> None:
    dets, kept = nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5) and kept.shape == (0,) and kept.dtype == torch.long
    points = torch.tensor([[3.0, 3.0, 3.0, 3.0]] * 3 + [[0.0, 0.0, 5.0, 5.0]])
    assert nms(points, torch.tensor([0.9, 0.8, 0.7, 0.6]), 0.5)[1].tolist() == [0, 1, 2, 3]
    pixels = torch.tensor([[3.0, 3.0, 4.0, 4.0]] * 2 + [[9.0, 9.0, 10.0, 10.0]])
    assert nms(pixels, torch.tensor([0.5, 0.9, 0.1]), 0.5)[1].tolist() == [1, 2]


def test_nms_takes_numpy() -> None:
    boxes, scores = some_boxes(20)
    dets, kept = nms(boxes.numpy(), scores.numpy(), 0.5)
    assert isinstance(dets, np.ndarray)
    assert kept.tolist() == nms(boxes, scores, 0.5)[1].tolist()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 30), st.sampled_from([0.05, 0.3, 0.7]), st.integers(0, 10_000))
def test_nms_partition(count: int, threshold: float, seed: int) -> None:
    boxes, scores = some_boxes(count, seed)
    kept = nms(boxes, scores, threshold)[1].tolist()
    exact = boxes.double().numpy()
    for i in range(count):
        better = [k for k in kept if scores[k] > scores[i]]
        overlapping = [k for k in better if iou(exact[i], exact[k]) > threshold + 1e-6]
        assert (i in kept) != bool(overlapping) or any(abs(iou(exact[i], exact[k]) - threshold) <= 1e-6 for k in better)


def test_batched_nms_keeps_classes_apart() -> None:
    boxes, scores = some_boxes(50)
    labels = torch.randint(0, 3, (50,))
    dets, kept = batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=0.3))
    expected = []
    for label in range(3):
        mine = (labels == label).nonzero()[:, 0]
        chosen = nms_by_definition(boxes[mine].double().numpy(), scores[mine].numpy(), 0.3)
        expected += mine[chosen].tolist()
    assert sorted(kept.tolist()) == sorted(expected)
    assert (dets[:-1, 4] >= dets[1:, 4]).all()


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize(('count', 'lowest'), [(1, 1e-3), (40, 1e-3), (40, 0.3)])
def test_soft_nms_equals_the_definition(method: str, offset: int, count: int, lowest: float) -> None:
    boxes, scores = some_boxes(count)
    dets, kept = soft_nms(boxes, scores, 0.3, sigma=0.5, min_score=lowest, method=method, offset=offset)
    order, final = soft_nms_by_definition(
        boxes.double().numpy(), scores.double().numpy(), 0.3, 0.5, lowest, method, offset
    )
    assert kept.tolist() == order
    assert torch.equal(dets[:, :4], boxes[order])
    torch.testing.assert_close(dets[:, 4], torch.tensor(final, dtype=torch.float32), rtol=1e-5, atol=1e-7)


def test_soft_nms_leaves_its_input_alone_and_keeps_the_best_box() -> None:
    boxes, scores = some_boxes(10)
    before = boxes.clone(), scores.clone()
    dets, kept = soft_nms(boxes, scores, 0.3, min_score=2.0)
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])
    assert kept.tolist() == [int(scores.argmax())] and dets.shape == (1, 5)


def test_soft_nms_on_ties_points_and_nothing() -> None:
    same = torch.tensor([[0.0, 0.0, 4.0, 4.0]] * 5)
    dets, kept = soft_nms(same, torch.full((5,), 0.5), 0.3, min_score=1e-3, method='naive')
    assert kept.tolist() == [0] and dets[0, 4] == 0.5
    points = torch.tensor([[2.0, 2.0, 2.0, 2.0]] * 3)
    assert len(soft_nms(points, torch.tensor([0.5, 0.4, 0.3]), 0.3, method='linear')[1]) == 3
    # Two points without area overlap by 0 / 0, and the score becomes NaN: chosen only where the scan starts at it.
    mixed = torch.tensor([[2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 4.0, 4.0]])
    dets, kept = soft_nms(mixed, torch.tensor([0.9, 0.8, 0.7]), method='gaussian')
    assert kept.tolist() == [0, 1, 2] and dets[:, 4].isnan().tolist() == [False, True, False]
    dets, kept = soft_nms(mixed[[0, 2, 1]], torch.tensor([0.9, 0.7, 0.8]), method='gaussian')
    assert kept.tolist() == [0, 1, 2] and dets[:, 4].isnan().tolist() == [False, False, True]
    dets, kept = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5) and kept.shape == (0,)


def test_nms_match_groups_by_the_best_suppressor() -> None:
    boxes, scores = some_boxes(60)
    groups = [group.tolist() for group in nms_match(torch.cat((boxes, scores[:, None]), 1), 0.4)]
    exact, expected = boxes.double().numpy(), []
    left = scores.argsort(descending=True).tolist()
    while left:
        best, *others = left
        group = [i for i in others if iou(exact[best], exact[i]) >= 0.4]
        expected.append([best, *group])
        left = [i for i in others if i not in group]
    assert groups == expected
    assert any(len(group) > 2 for group in groups)


def test_nms_match_counts_an_overlap_equal_to_the_threshold() -> None:
    dets = torch.tensor([[0.0, 0.0, 1.0, 10.0, 0.9], [0.0, 9.0, 1.0, 10.0, 0.8]])
    assert [g.tolist() for g in nms_match(dets, 0.1)] == [[0, 1]]
    assert [g.tolist() for g in nms_match(dets, 0.11)] == [[0], [1]]
    assert nms_match(torch.zeros(0, 5), 0.5) == []
