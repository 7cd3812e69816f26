"""Whether a file says what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mila_mm.export.two_stage import paste


@dataclass(frozen=True)
class Tolerance:
    """How far results may lie apart.

    Attributes:
        boxes: Pixels.
        scores: Of a detection; of a class, as a share of the highest score.
        masks: Least intersection over union of two masks.
        pixels: Least share of pixels with the same label.
        logits: Of a map, as a share of the largest one.
        unmatched: Share of detections that need no partner, of all and of the best ones alike. Where two boxes
            compete, rounding decides.
        edge: How near a score may be to the threshold, or to the last of those that are kept, to fall on either side.
        swapped: How many results of both sides need no partner, whichever they are, where there are enough for the
            share to allow it.
    """

    boxes: float
    scores: float
    masks: float
    pixels: float
    logits: float
    unmatched: float
    edge: float = 1e-6
    swapped: int = 0


TOLERANCES = {
    'fp32': Tolerance(boxes=0.1, scores=1e-3, masks=0.99, pixels=0.999, logits=1e-3, unmatched=0.0),
    'fp16': Tolerance(boxes=2.0, scores=1e-2, masks=0.9, pixels=0.99, logits=5e-2, unmatched=0.05, edge=1e-3),
}
# Of detections in fp32, where a swap of two proposals with the same score gives both of them other results.
_SWAPPED = 0.02
_SWAP = 4  # two on either side
# The edge is at least this many times as wide as what the scores of partners are off by.
_EDGE = 10.0
# The share of results, and the number at any rate, that may lie on the other side of the edge.
_AT_EDGE, _LEAST_AT_EDGE = 0.02, 2
# Among the best of so few as many may lack a partner as among these.
_FEW = 50


@dataclass
class Comparison:
    """What was compared, and the largest differences.

    Attributes:
        detections: How many.
        unpaired: How many results of either side have no partner, beyond the tolerance or at the edge of what is kept.
        boxes: Largest distance of a coordinate, pixels.
        scores: Largest difference.
        masks: Least intersection over union.
        pixels: Least share of pixels with the same label.
        logits: Largest difference, as a share of the largest logit.
        labels: The labels that the model gave to pixels.
        faults: What is beyond the tolerance, in words.
    """

    detections: int = 0
    unpaired: int = 0
    boxes: float = 0.0
    scores: float = 0.0
    masks: float | None = None
    pixels: float | None = None
    logits: float | None = None
    labels: set[int] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def summary(self, kind: str) -> str:
        """Describe it in one line."""
        if kind == 'classifier':
            return f'scores within {self.scores:.1e} of the highest'
        if kind == 'segmentor':
            logits = '' if self.logits is None else f', logits within {self.logits:.1e} of the largest'
            return f'{100 * (self.pixels or 0.0):.3f} % of the labels the same{logits}'
        masks = '' if self.masks is None else f', masks with IoU {self.masks:.4f} and more'
        lonely = f', {self.unpaired} without a partner' if self.unpaired else ''
        return (
            f'{self.detections} detections: boxes within {self.boxes:.1e} px, scores within {self.scores:.1e}'
            f'{masks}{lonely}'
        )


def tolerance_for(precision: str, ranked: bool) -> Tolerance:
    """Return how far results of a model may lie apart.

    Args:
        precision: 'fp32' or 'fp16'.
        ranked: Whether results depend on the rank of proposals, see :class:`mila_mm.export.deployed.Deployed`.
    """
    tolerance = TOLERANCES[precision]
    return replace(tolerance, unmatched=max(tolerance.unmatched, _SWAPPED), swapped=_SWAP) if ranked else tolerance


def compare(
    kind: str,
    results: Mapping[str, np.ndarray],
    expected: Sequence[Mapping[str, np.ndarray]],
    sizes: np.ndarray,
    tolerance: Tolerance,
    settings: Mapping[str, float],
    into: Comparison,
) -> None:
    """Compare a batch of a file's results with the model's.

    Args:
        kind: 'detector', 'segmentor' or 'classifier'.
        results: Of the file, by name.
        expected: Of the model, for each image.
        sizes: (B, 2), height and width of each image's content.
        tolerance: What is allowed.
        settings: For a detector ``score_threshold``, ``mask_threshold`` and ``most``.
        into: Where differences are gathered.
    """
    for i, wanted in enumerate(expected):
        if kind == 'classifier':
            # Of many classes none may have a high score.
            apart = float(abs(results['scores'][i] - wanted['scores']).max() / wanted['scores'].max())
            into.scores = max(into.scores, apart)
            if not apart <= tolerance.scores:  # neither is what is no number
                into.faults.append(f'scores differ by {apart:.2g} of the highest')
        elif kind == 'segmentor':
            _compare_maps({name: x[i] for name, x in results.items()}, wanted, tolerance, into)
        else:
            count = int(results['count'][i])
            got = {name: results[name][i][:count] for name in results if name != 'count'}
            _compare_detections(got, wanted, sizes[i], tolerance, settings, into)


def _compare_maps(
    got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: Tolerance, into: Comparison
) -> None:
    same = float((got['labels'] == wanted['labels']).mean())
    into.labels.update(np.unique(wanted['labels']).tolist())
    into.pixels = same if into.pixels is None else min(same, into.pixels)
    if same < tolerance.pixels:
        into.faults.append(f'{100 * (1 - same):.2g} % of the labels differ')
    if 'logits' in got:
        apart = float(abs(got['logits'] - wanted['logits']).max() / max(abs(wanted['logits']).max(), 1e-6))
        into.logits = max(into.logits or 0.0, apart)
        if not apart <= tolerance.logits:
            into.faults.append(f'logits differ by {apart:.2g} of the largest')


def _compare_detections(
    got: dict[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    size: np.ndarray,
    tolerance: Tolerance,
    settings: Mapping[str, float],
    into: Comparison,
) -> None:
    pairs, lonely_got, lonely_wanted = match(got, wanted, tolerance)
    into.detections += len(wanted['scores'])
    near = tolerance.edge
    if pairs:
        mine, theirs = map(list, zip(*pairs, strict=True))
        into.boxes = max(into.boxes, float(abs(got['boxes'][mine] - wanted['boxes'][theirs]).max()))
        apart = abs(got['scores'][mine] - wanted['scores'][theirs])
        into.scores = max(into.scores, float(apart.max()))
        near = min(tolerance.scores, max(_EDGE * float(np.median(apart)), tolerance.edge))
        if 'masks' in wanted:
            least = _least_overlap(got, wanted, mine, theirs, size, settings['mask_threshold'])
            into.masks = least if into.masks is None else min(into.masks, least)
            if least < tolerance.masks:
                into.faults.append(f'masks of the same object have IoU {least:.3f}')
    scores = np.array([*got['scores'][lonely_got], *wanted['scores'][lonely_wanted]])
    into.unpaired += len(scores)
    # A detection at the threshold, or the last of those that are kept, may fall on either side.
    edges = [settings['score_threshold']]
    if len(wanted['scores']) >= settings['most'] or len(got['scores']) >= settings['most']:
        edges += [float(x['scores'].min()) for x in (got, wanted) if len(x['scores'])]
    away = abs(scores[:, None] - np.array(edges)).min(1)
    most_excused = int(_LEAST_AT_EDGE + _AT_EDGE * 2 * len(wanted['scores']))
    excused = [k for k in np.argsort(away)[:most_excused] if away[k] <= near]
    odd = np.delete(scores, excused)
    if _too_many(odd, wanted['scores'], tolerance):
        into.faults.append(
            f'{len(odd)} detections of {len(wanted["scores"])} have no partner with the same label, boxes within '
            f'{tolerance.boxes} px and scores within {tolerance.scores}; the highest score {max(odd):.3f}'
        )


def _too_many(odd: np.ndarray, scores: np.ndarray, tolerance: Tolerance) -> bool:
    """Whether more results of both sides lack a partner than may: of all, or of the best, which are the objects."""
    falling, count, share = np.sort(scores)[::-1], len(scores), 2 * tolerance.unmatched
    for best in range(1, count + 1):
        below = (odd < falling[best - 1]) & (best < count)  # what is no number is not below
        if len(odd) - below.sum() > max(share * max(best, min(count, _FEW)), min(tolerance.swapped, share * count)):
            return True
    return count == 0 and len(odd) > 0


def match(
    got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: Tolerance
) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Pair detections that are the same within the tolerance, each with its nearest; the rest of both is returned."""
    free = set(range(len(got['scores'])))
    pairs, lonely = [], []
    for j in range(len(wanted['scores'])):
        near = [
            (abs(got['boxes'][i] - wanted['boxes'][j]).max(), i)
            for i in free
            if got['labels'][i] == wanted['labels'][j]
            and abs(got['scores'][i] - wanted['scores'][j]) <= tolerance.scores
        ]
        distance, i = min(near, default=(np.inf, -1))
        if distance <= tolerance.boxes:
            pairs.append((i, j))
            free.remove(i)
        else:
            lonely.append(j)
    return pairs, sorted(free), lonely


def _least_overlap(
    got: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    mine: list[int],
    theirs: list[int],
    size: np.ndarray,
    threshold: float,
) -> float:
    least = 1.0
    height, width = (int(side) for side in size)
    for i, j in zip(mine, theirs, strict=True):
        mask: Any = got['masks'][i]
        if mask.dtype == np.bool_:
            mask = mask[:height, :width]
        else:
            box = torch.from_numpy(got['boxes'][i])[None, None]
            mask = (paste(torch.from_numpy(mask)[None, None], box, (height, width))[0, 0] >= threshold).numpy()
        union = (mask | wanted['masks'][j]).sum()
        # Of a mask of a few pixels one may lie on the threshold.
        different = (mask ^ wanted['masks'][j]).sum()
        least = min(least, 1.0 if different <= 1 or union == 0 else float(1 - different / union))
    return least
