"""Layers that are stated anew for graphs equal those that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder, TBLRBBoxCoder
from torch import nn
from torch.export import Dim

from mila_mm.errors import UserError
from mila_mm.export.boxes import NOTHING, RoIFeatures, Suppression, best, check_coder, decode
from mila_mm.export.formats import check_pools
from mila_mm.export.pieces import AdaptivePool, PooledPyramid, Preprocess, deployable
from mila_mm.export.two_stage import paste
from mila_mm.nn.trunk import MILATrunk


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 23), st.integers(1, 23), st.integers(1, 7), st.integers(1, 7))
def test_the_pool_is_pytorchs(height, width, rows, columns):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(
        AdaptivePool((rows, columns))(x), nn.AdaptiveAvgPool2d((rows, columns))(x), rtol=1e-6, atol=1e-6
    )


def test_a_recorded_pyramid_takes_even_and_odd_maps():
    """As a graph of mmdet's own does not."""
    pyramid = FPN([2, 3], 4, num_outs=4).eval()
    height, width = Dim('height', min=5, max=99), Dim('width', min=5, max=99)
    shapes = tuple({2: scale * height, 3: scale * width} for scale in (2, 1))

    def maps(rows, columns):
        return tuple(torch.randn(1, channels, k * rows, k * columns) for channels, k in ((2, 2), (3, 1)))

    expected = [(sizes, inputs, pyramid(inputs)) for sizes in ((6, 8), (5, 9), (7, 11)) for inputs in [maps(*sizes)]]
    with torch.no_grad():
        stated = PooledPyramid(pyramid)
        program = torch.export.export(stated, (maps(8, 6),), dynamic_shapes=(shapes,)).module()
        for _, inputs, levels in expected:
            for mine in (stated, program):
                torch.testing.assert_close(mine(inputs), levels)


def test_a_graph_of_the_pool_is_right_at_sizes_that_it_was_not_made_at(tmp_path):
    pytest.importorskip('onnxscript', reason='the extra [export] is not installed')
    onnxruntime = pytest.importorskip('onnxruntime')
    sides = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    model = deployable(nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Identity()))
    with torch.no_grad():
        program = torch.onnx.export(
            model, (torch.rand(1, 2, 7, 9),), dynamo=True, dynamic_shapes=(sides[0],), verbose=False
        )
    program.save(tmp_path / 'pool.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'pool.onnx', providers=['CPUExecutionProvider'])
    for size in ((7, 9), (10, 8), (3, 31)):
        x = torch.rand(1, 2, *size)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), nn.AdaptiveAvgPool2d(3)(x), rtol=1e-5, atol=1e-5)


class Pools(nn.Module):
    """Calls the function, which no replacement of modules reaches."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        """Pool."""
        return nn.functional.adaptive_avg_pool2d(x, self.size)


@pytest.mark.parametrize(('size', 'refused'), [(1, False), ((1, 1), False), (3, True), ((1, 2), True)])
def test_a_pool_that_would_be_wrong_at_other_sizes_is_refused_by_name(size, refused):
    sides = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    recorded = torch.export.export(nn.Sequential(Pools(size)), (torch.rand(1, 2, 7, 9),), dynamic_shapes=(sides[0],))
    if not refused:
        check_pools(recorded)
        return
    with pytest.raises(UserError, match=r'Pools pools maps to .* without --dynamic'):
        check_pools(recorded)


def test_folded_norms_give_the_same_maps_and_leave_the_model_alone():
    torch.manual_seed(0)
    model = MILATrunk('nano').eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    keys = set(model.state_dict())
    folded = deployable(model)
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(folded(x), model(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize('bgr_to_rgb', [True, False])
def test_preprocessing_is_mmdets(bgr_to_rgb):
    theirs = DetDataPreprocessor(
        mean=[123.675, 116.28, 103.53], std=[58.4, 57.1, 57.4], bgr_to_rgb=bgr_to_rgb, pad_size_divisor=32
    )
    images = torch.randint(0, 256, (2, 50, 70, 3), dtype=torch.uint8)
    sizes = torch.tensor([[50, 70], [31, 44]])
    bgr = [x[:h, :w].flip(-1).permute(2, 0, 1) for x, (h, w) in zip(images, sizes.tolist(), strict=True)]
    wanted = theirs({'inputs': bgr, 'data_samples': None}, False)['inputs']
    torch.testing.assert_close(Preprocess(theirs, 32)(images, sizes), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('add_ctr_clamp', [False, True])
def test_deltas_are_decoded_as_in_mmdet(add_ctr_clamp):
    torch.manual_seed(0)
    coder = DeltaXYWHBBoxCoder(target_stds=(0.1, 0.2, 0.3, 0.4), add_ctr_clamp=add_ctr_clamp, ctr_clamp=4)
    corner = torch.rand(50, 2) * 60
    priors = torch.cat((corner, corner + torch.rand(50, 2) * 40), dim=1)
    deltas = torch.randn(50, 4) * 20
    wanted = coder.decode(priors, deltas, max_shape=(64, 80))
    torch.testing.assert_close(decode(coder, priors, deltas, torch.tensor([64, 80])), wanted)


def test_distances_are_decoded_as_in_mmdet():
    points, distances = torch.rand(50, 2) * 90, torch.rand(50, 4) * 40
    coder = DistancePointBBoxCoder()
    wanted = coder.decode(points, distances, max_shape=(64, 80))
    torch.testing.assert_close(decode(coder, points, distances, torch.tensor([64, 80])), wanted)


def test_another_coder_is_refused_by_name():
    with pytest.raises(UserError, match='TBLRBBoxCoder'):
        check_coder(TBLRBBoxCoder(), 'FSAFHead')


@pytest.mark.parametrize('agnostic', [False, True])
@pytest.mark.parametrize('count', [5, 300])
def test_suppression_is_mmcvs(agnostic, count):
    from mmcv.ops import batched_nms

    torch.manual_seed(count)
    corner = torch.rand(200, 2) * 60
    boxes = torch.cat((corner, corner + 5 + torch.rand(200, 2) * 30), dim=1)
    scores, groups = torch.rand(200), torch.randint(0, 3, (200,))
    cfg = dict(type='nms', iou_threshold=0.5, class_agnostic=agnostic)
    there = scores > 0.3
    wanted, kept = batched_nms(boxes[there], scores[there], groups[there], cfg)
    values, index = Suppression(cfg, 'head')(boxes, torch.where(there, scores, NOTHING), groups, count)
    most = min(count, len(kept))
    torch.testing.assert_close(values[:most], wanted[:most, 4])
    assert torch.equal(index[:most], there.nonzero()[:, 0][kept][:most])
    assert (values[most:] == NOTHING).all()


def test_suppression_of_nothing():
    values, index = Suppression(dict(iou_threshold=0.5), 'head')(
        torch.rand(7, 4), torch.full((7,), NOTHING), torch.zeros(7), 3
    )
    assert (values == NOTHING).all()
    assert index.shape == (3,)


class Suppressed(nn.Module):
    """Suppression as a module, to record."""

    def forward(self, boxes, scores):
        """Keep two."""
        return Suppression(dict(iou_threshold=0.5), 'head')(boxes, scores, torch.zeros(len(scores)), 2)


@pytest.mark.parametrize('there', [0, 1, 2, 5])
def test_a_graph_of_the_suppression_holds_where_less_than_two_boxes_are_there(there):
    boxes = torch.tensor([[10.0 * i, 0, 10 * i + 8, 8] for i in range(5)])
    program = torch.export.export(Suppressed(), (boxes, torch.rand(5))).module()
    scores = torch.where(torch.arange(5) < there, torch.linspace(0.9, 0.5, 5), NOTHING)
    values, index = program(boxes, scores)
    assert (values > NOTHING).sum() == min(there, 2)
    assert index[: min(there, 2)].tolist() == list(range(min(there, 2)))


@pytest.mark.parametrize('cfg', [dict(type='soft_nms', iou_threshold=0.5), dict(type='nms'), None])
def test_another_suppression_is_refused(cfg):
    with pytest.raises(UserError, match='bbox_head suppresses boxes with'):
        Suppression(cfg, 'bbox_head')


def test_the_best_are_filled_up():
    values, index = best(torch.tensor([[0.1, 0.9]]), 3)
    torch.testing.assert_close(values, torch.tensor([[0.9, 0.1, NOTHING]]))
    assert index[0, :2].tolist() == [1, 0]


def test_features_of_regions_are_mmdets():
    torch.manual_seed(0)
    extractor = SingleRoIExtractor(
        dict(type='RoIAlign', output_size=7, sampling_ratio=0), out_channels=4, featmap_strides=[4, 8]
    )
    maps = [torch.randn(2, 4, 24, 32), torch.randn(2, 4, 12, 16)]
    corner = torch.rand(30, 2) * 60
    extent = torch.rand(30, 2) * 200
    rois = torch.cat((torch.randint(0, 2, (30, 1)).float(), corner, corner + extent), dim=1)
    rois[0, 1:] = 0  # filling
    torch.testing.assert_close(RoIFeatures(extractor)(maps, rois), extractor(maps, rois))


def test_pasted_masks_are_mmdets():
    torch.manual_seed(0)
    masks = torch.rand(1, 6, 28, 28)
    corner = torch.rand(6, 2) * 40
    boxes = torch.cat((corner, corner + torch.rand(6, 2) * 40), dim=1)
    wanted, _ = _do_paste_mask(masks[0][:, None], boxes, 61, 83, skip_empty=False)
    torch.testing.assert_close(paste(masks, boxes[None], (61, 83))[0], wanted, rtol=1e-4, atol=1e-5)
