"""The comparison that decides whether a file is kept: what it lets pass, and what not."""

import numpy as np
import pytest

from mila_mm.export.compare import TOLERANCES, Comparison, compare, tolerance_for

SIZES = np.array([[40, 60]])
SETTINGS = dict(score_threshold=0.05, mask_threshold=0.5, most=6.0)


def found(count=4, masks=True):
    """Detections of a model: one image, boxes of 20 pixels, masks that fill the left half of each."""
    corner = np.stack([5.0 * np.arange(count), 3.0 * np.arange(count)], 1)
    boxes = np.concatenate([corner, corner + 20], 1).astype(np.float32)
    scores = np.linspace(0.9, 0.3, count).astype(np.float32)
    model = dict(boxes=boxes, scores=scores, labels=np.arange(count) % 3)
    if masks:
        model['masks'] = np.zeros((count, 40, 60), bool)
        for mask, (x, y, _, _) in zip(model['masks'], boxes.astype(int), strict=True):
            mask[y : y + 20, x : x + 10] = True
    return model


def as_file(model, most=6):
    """The same as a file returns it: one batch, filled up, with a count."""
    count = len(model['scores'])
    filled = {
        name: np.concatenate([x, np.zeros((most - count, *x.shape[1:]), x.dtype)])[None] for name, x in model.items()
    }
    return {**filled, 'count': np.array([count])}


def faults(results, model, kind='detector', precision='fp32', settings=SETTINGS):
    comparison = Comparison()
    compare(kind, results, [model], SIZES, TOLERANCES[precision], settings, comparison)
    return comparison


def test_what_is_the_same_passes_and_is_counted():
    comparison = faults(as_file(found()), found())
    assert (comparison.detections, comparison.unpaired, comparison.faults) == (4, 0, [])
    assert (comparison.boxes, comparison.scores, comparison.masks) == (0.0, 0.0, 1.0)
    assert faults(as_file(found(0, False)), found(0, False)).faults == []


@pytest.mark.parametrize(
    ('name', 'where', 'by', 'passes'),
    [
        ('boxes', (0, 1, 2), 0.09, True),
        ('boxes', (0, 1, 2), 0.11, False),
        ('boxes', (0, 1, 2), np.nan, False),
        ('scores', (0, 1), 0.0009, True),
        ('scores', (0, 1), 0.0011, False),
        ('scores', (0, 1), np.nan, False),
        ('labels', (0, 1), 1, False),
        ('count', (0,), -1, False),
        ('count', (0,), 1, False),
        ('count', (0,), -4, False),
    ],
)
def test_what_differs_is_a_fault(name, where, by, passes):
    results = as_file(found())
    results['scores'][0, 4:] = 0.2  # what another count would show
    results[name][where] += by
    comparison = faults(results, found())
    assert bool(comparison.faults) != passes
    assert (comparison.unpaired == 0) == passes


@pytest.mark.parametrize(('rows', 'passes'), [(0, True), (1, False)])
def test_a_mask_that_differs_is_a_fault(rows, passes):
    model = found()
    x, y = (int(v) for v in model['boxes'][2, :2])
    results = as_file(found())
    results['masks'][0, 2, y : y + rows, x : x + 10] = False  # one row of twenty: IoU 0.95
    assert bool(faults(results, model).faults) != passes


@pytest.mark.parametrize('most', [4.0, 6.0])
@pytest.mark.parametrize(('apart', 'near'), [(1e-7, True), (5e-4, False)])
def test_only_at_the_edge_of_what_is_kept_rounding_decides(most, apart, near):
    """The last of the most that are kept is another one, with a score that is the same but for rounding."""
    model, other = found(masks=False), found(masks=False)
    other['boxes'][3] += 15
    other['scores'][3] += apart
    model['scores'][2] = model['scores'][3]
    other['scores'][2] = model['scores'][2]
    comparison = faults(as_file(other), model, settings={**SETTINGS, 'most': most})
    assert comparison.unpaired == 2
    assert bool(comparison.faults) != (near and most == 4.0)


@pytest.mark.parametrize(('score', 'passes'), [(0.05 + 1e-7, True), (0.0509, False)])
def test_at_the_threshold_rounding_decides(score, passes):
    model, other = found(masks=False), found(3, masks=False)
    other['scores'] = model['scores'][:3]
    model['scores'][3] = score
    comparison = faults(as_file(other), model)
    assert comparison.unpaired == 1 and bool(comparison.faults) != passes


def test_many_results_with_nearly_the_same_score_need_their_partners():
    """Scores of a detector that has learnt little lie close together: that they are near the last one is no excuse."""
    model = found(6, masks=False)
    model['scores'] = np.linspace(0.0605, 0.06, 6).astype(np.float32)
    other = {name: x.copy() for name, x in model.items()}
    other['boxes'] += 8
    assert faults(as_file(other), model).faults


@pytest.mark.parametrize(
    ('ranked', 'first', 'swapped', 'passes'),
    [(False, 98, 2, False), (True, 98, 2, True), (True, 95, 3, False), (True, 30, 2, True), (True, 30, 3, False)],
)
def test_only_where_ranks_decide_some_results_may_be_others(ranked, first, swapped, passes):
    """Two equal proposals that change places change two results, of a hundred."""
    model = found(100, masks=False)
    other = {name: x.copy() for name, x in model.items()}
    other['boxes'][first : first + swapped] += 7.5
    comparison = Comparison()
    settings = {**SETTINGS, 'most': 100.0}
    tolerance = tolerance_for('fp32', ranked)
    compare('detector', as_file(other, 100), [model], SIZES, tolerance, settings, comparison)
    assert comparison.unpaired == 2 * swapped and bool(comparison.faults) != passes


@pytest.mark.parametrize(('wrong', 'passes'), [(1, True), (3, False)])
def test_label_maps(wrong, passes):
    model = dict(labels=np.zeros((40, 60), np.int64))
    results = dict(labels=np.zeros((1, 40, 60), np.uint8))
    results['labels'][0, 0, :wrong] = 1
    comparison = faults(results, model, 'segmentor')
    assert comparison.pixels == pytest.approx(1 - wrong / 2400) and bool(comparison.faults) != passes


@pytest.mark.parametrize(('by', 'passes'), [(0.0, True), (0.004, True), (0.006, False), (np.nan, False)])
def test_logits(by, passes):
    model = dict(labels=np.zeros((40, 60), np.int64), logits=np.zeros((2, 40, 60), np.float32))
    model['logits'][0, 1, 1] = -5
    results = {name: x[None].copy() for name, x in model.items()}
    results['logits'][0, 1, 3, 4] += by
    assert bool(faults(results, model, 'segmentor').faults) != passes


@pytest.mark.parametrize(('ranked', 'precision'), [(True, 'fp32'), (False, 'fp16')])
def test_the_best_results_need_their_partners_above_all(ranked, precision):
    model = found(300, masks=False)
    settings, tolerance = {**SETTINGS, 'most': 300.0}, tolerance_for(precision, ranked)
    for name, by in (('boxes', 80), ('scores', -0.4), ('scores', np.nan)):
        other = {key: x.copy() for key, x in model.items()}
        other[name][:6] += by
        comparison = Comparison()
        compare('detector', as_file(other, 300), [model], SIZES, tolerance, settings, comparison)
        assert comparison.faults


@pytest.mark.parametrize('gone', [False, True])
def test_the_edge_excuses_few_whatever_one_pair_is_off_by(gone):
    """Eighty detections right above the threshold, somewhere else or not there, beside one that is a little off."""
    model = found(120, masks=False)
    model['scores'] = np.concatenate([np.linspace(0.9, 0.3, 40), np.linspace(0.06, 0.0501, 80)]).astype(np.float32)
    other = {key: x[: 40 if gone else 120].copy() for key, x in model.items()}
    other['scores'][0] += 2e-3
    other['boxes'][40:] += 200
    comparison = faults(as_file(other, 120), model, precision='fp16', settings={**SETTINGS, 'most': 130.0})
    assert comparison.faults


def test_tied_results_at_the_edge_are_excused_up_to_a_share():
    """Of a model that has learnt little hundreds have nearly the last score; in fp16 some of them are others."""
    model = found(300, masks=False)
    model['scores'] = np.linspace(0.0100, 0.0099, 300).astype(np.float32)
    other = {key: x.copy() for key, x in model.items()}
    other['boxes'][285:] += 1000
    settings = {**SETTINGS, 'score_threshold': 0.001, 'most': 300.0}
    assert not faults(as_file(other, 300), model, precision='fp16', settings=settings).faults
    other['boxes'][230:285] += 1000
    assert faults(as_file(other, 300), model, precision='fp16', settings=settings).faults


def test_sure_scores_do_not_narrow_the_edge_of_fp16():
    model = found(6, masks=False)
    model['scores'] = np.array([0.999, 0.999, 0.999, 0.999, 0.6, 0.0503], np.float32)
    other = {key: x[:5].copy() for key, x in model.items()}
    other['scores'][:5] -= np.array([1e-5] * 4 + [2e-3], np.float32)
    assert not faults(as_file(other), model, precision='fp16').faults


@pytest.mark.parametrize('high', [0.8, 0.001])
@pytest.mark.parametrize(('by', 'passes'), [(0.0, True), (9e-4, True), (-1.1e-3, False), (np.nan, False)])
def test_scores_of_classes(by, passes, high):
    model = dict(scores=np.array([high / 4, high], np.float32))
    results = dict(scores=np.array([[high / 4, high * (1 + by)]], np.float32))
    assert bool(faults(results, model, 'classifier').faults) != passes
