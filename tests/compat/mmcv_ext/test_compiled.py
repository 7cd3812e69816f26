"""The stand-in against a compiled mmcv, op by op, with the buffers that mmcv's Python would pass."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext import is_stand_in

pytestmark = pytest.mark.skipif(is_stand_in(), reason='mmcv is installed without its compiled ops')

Call = tuple[tuple[Any, ...], dict[str, Any]]


def boxes(count: int) -> Tensor:
    corner = torch.rand(count, 2) * 40 - 5
    return torch.cat((corner, corner + torch.rand(count, 2) * 20 + 1), 1)


def rois(count: int) -> Tensor:
    return torch.cat((torch.randint(0, 2, (count, 1)).float(), boxes(count)), 1)


def nms(offset: int) -> Call:
    return (boxes(500), torch.rand(500)), dict(iou_threshold=0.3, offset=offset)


def softnms(method: int) -> Call:
    # A coarse grid of boxes and scores, so that ties abound.
    given = boxes(300).div(4).round().mul(4)
    scores = torch.rand(300).mul(20).round().div(20)
    options = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=0)
    return (given, scores, torch.zeros(300, 5)), options


def nms_match() -> Call:
    return (torch.cat((boxes(300), torch.rand(300, 1)), 1),), dict(iou_threshold=0.4)


def bbox_overlaps(mode: int, aligned: bool, offset: int) -> Call:
    ious = torch.zeros(40) if aligned else torch.zeros(40, 40)
    return (boxes(40), boxes(40), ious), dict(mode=mode, aligned=aligned, offset=offset)


def roi_align_forward(mode: int, ratio: int, aligned: bool) -> Call:
    shape = (30, 8, 5, 7)
    argmax = [torch.zeros(shape if mode == 0 else 0) for _ in range(2)]
    geometry = dict(aligned_height=5, aligned_width=7, spatial_scale=0.5, sampling_ratio=ratio)
    given = (torch.randn(2, 8, 20, 25), rois(30), torch.zeros(shape), *argmax)
    return given, dict(**geometry, pool_mode=mode, aligned=aligned)


def roi_align_backward(mode: int, ratio: int, aligned: bool) -> Call:
    shape = (30, 8, 5, 7)
    argmax = [torch.rand(shape) * 30 - 5 if mode == 0 else torch.zeros(0) for _ in range(2)]
    geometry = dict(aligned_height=5, aligned_width=7, spatial_scale=0.5, sampling_ratio=ratio)
    given = (torch.randn(shape), rois(30), *argmax, torch.zeros(2, 8, 20, 25))
    return given, dict(**geometry, pool_mode=mode, aligned=aligned)


def conv_geometry(short: bool) -> dict[str, int]:
    if short:
        sizes = dict(kW=3, kH=3, dW=2, dH=1, padW=1, padH=2, dilationW=1, dilationH=2)
        return dict(**sizes, group=2, deformable_group=2, im2col_step=2)
    sizes = dict(kernel_h=3, kernel_w=3, stride_h=1, stride_w=2, pad_h=2, pad_w=1, dilation_h=2, dilation_w=1)
    return dict(**sizes, group=2, deformable_group=2)


def conv_operands(larger: int = 0) -> tuple[Tensor, ...]:
    """Input, offset, mask, weight, bias, output; offsets and masks larger than the output on demand."""
    high, wide = 12, 8
    offset = torch.randn(2, 36, high + larger, wide + larger) * 2
    mask = torch.rand(2, 18, high + larger, wide + larger)
    return (
        torch.randn(2, 8, 12, 15),
        offset,
        mask,
        torch.randn(6, 4, 3, 3),
        torch.randn(6),
        torch.zeros(2, 6, high, wide),
    )


def deform_conv_forward() -> Call:
    maps, offset, _, weight, _, output = conv_operands()
    return (maps, weight, offset, output, torch.zeros(0), torch.zeros(0)), conv_geometry(True)


def deform_conv_backward_input() -> Call:
    maps, offset, _, weight, _, output = conv_operands()
    grads = torch.zeros_like(maps), torch.zeros_like(offset)
    return (maps, offset, torch.randn_like(output), *grads, weight, torch.zeros(0)), conv_geometry(True)


def deform_conv_backward_parameters() -> Call:
    maps, offset, _, weight, _, output = conv_operands()
    given = (maps, offset, torch.randn_like(output), torch.zeros_like(weight), torch.zeros(0), torch.zeros(0))
    return given, dict(**conv_geometry(True), scale=1.0)


def modulated_deform_conv_forward(larger: int) -> Call:
    maps, offset, mask, weight, bias, output = conv_operands(larger)
    given = (maps, weight, bias, torch.zeros(0), offset, mask, output, torch.zeros(0))
    return given, dict(**conv_geometry(False), with_bias=True)


def modulated_deform_conv_backward(larger: int) -> Call:
    maps, offset, mask, weight, bias, output = conv_operands(larger)
    grads = [torch.zeros_like(t) for t in (maps, weight, bias, offset, mask)]
    given = (maps, weight, bias, torch.zeros(0), offset, mask, torch.zeros(0), *grads, torch.randn_like(output))
    return given, dict(**conv_geometry(False), with_bias=True)


def psamask(backward: bool, kind: int) -> Call:
    sizes = dict(num_=2, h_feature=5, w_feature=6, h_mask=7, w_mask=5, half_h_mask=3, half_w_mask=2)
    window, whole = torch.randn(2, 35, 5, 6), torch.randn(2, 30, 5, 6)
    given = (whole, torch.zeros_like(window)) if backward else (window, torch.zeros_like(whole))
    return given, dict(psa_type=kind, **sizes)


def focal(softmax: bool, backward: bool) -> Call:
    logits, target, weight = torch.randn(50, 9), torch.randint(0, 9, (50,)), torch.rand(9)
    if softmax:
        logits = logits.softmax(1)
    row = torch.zeros(50)
    outputs = {
        (False, False): [torch.zeros_like(logits)],
        (False, True): [torch.zeros_like(logits)],
        (True, False): [row],
        (True, True): [row, torch.zeros_like(logits)],
    }
    return (logits, target, weight, *outputs[softmax, backward]), dict(gamma=2.0, alpha=0.25)


def roi_pool_forward() -> Call:
    output = torch.zeros(30, 8, 5, 7)
    given = (torch.randn(2, 8, 20, 25), rois(30), output, output.int())
    return given, dict(pooled_height=5, pooled_width=7, spatial_scale=0.5)


def roi_pool_backward() -> Call:
    argmax = torch.randint(-1, 500, (30, 8, 5, 7), dtype=torch.int)
    given = (torch.randn(30, 8, 5, 7), rois(30), argmax, torch.zeros(2, 8, 20, 25))
    return given, dict(pooled_height=5, pooled_width=7, spatial_scale=0.5)


def attention(backward: bool) -> Call:
    shapes = torch.tensor([[9, 7], [4, 5]])
    value, location = torch.randn(2, 83, 4, 8), torch.rand(2, 11, 4, 2, 3, 2) * 1.4 - 0.2
    weight = torch.rand(2, 11, 4, 2, 3)
    given: tuple[Tensor, ...] = (value, shapes, torch.tensor([0, 63]), location, weight)
    if backward:
        given = (*given, torch.randn(2, 11, 32), *(torch.zeros_like(t) for t in (value, location, weight)))
    return given, dict(im2col_step=2)


def deform_roi_pool(backward: bool) -> Call:
    maps, output, offset = torch.randn(2, 8, 20, 25), torch.zeros(30, 8, 5, 7), torch.randn(30, 2, 5, 7)
    inner = torch.tensor([[0.0, 12.0, 12.0, 30.0, 28.0]]).repeat(30, 1)  # away from the border
    options = dict(pooled_height=5, pooled_width=7, spatial_scale=0.5, sampling_ratio=2, gamma=0.1)
    if backward:
        grads = torch.zeros_like(maps), torch.zeros_like(offset)
        return (torch.randn_like(output), maps, inner, offset, *grads), options
    return (maps, rois(30), offset, output), options


def border_align_forward() -> Call:
    output = torch.zeros(2, 3, 15, 4)
    given = torch.stack((boxes(15), boxes(15)))
    return (torch.randn(2, 12, 20, 25), given, output, output.int()), dict(pool_size=6)


def carafe_naive(backward: bool) -> Call:
    maps, masks = torch.randn(2, 8, 6, 7), torch.rand(2, 50, 12, 14)
    output = torch.randn(2, 8, 12, 14)
    given = (
        (output, maps, masks, torch.zeros_like(maps), torch.zeros_like(masks)) if backward else (maps, masks, output)
    )
    return given, dict(kernel_size=5, group_size=2, scale_factor=2)


def masked_im2col_forward() -> Call:
    index = torch.randint(0, 6, (9,)), torch.randint(0, 7, (9,))
    return (torch.randn(1, 3, 6, 7), *index, torch.zeros(27, 9)), dict(kernel_h=3, kernel_w=3, pad_h=1, pad_w=1)


def prroi_pool_forward() -> Call:
    given = (torch.randn(2, 8, 20, 25), rois(30), torch.zeros(30, 8, 5, 7))
    return given, dict(pooled_height=5, pooled_width=7, spatial_scale=0.5)


BOTH: list[tuple[str, Callable[[], Call]]] = [
    *[('nms', lambda o=o: nms(o)) for o in (0, 1)],
    *[('bbox_overlaps', lambda a=a: bbox_overlaps(*a)) for a in ((0, False, 0), (1, False, 1), (0, True, 1))],
    *[
        (f'roi_align_{way}', lambda f=f, a=a: f(*a))
        for way, f in (('forward', roi_align_forward), ('backward', roi_align_backward))
        for a in ((1, 0, True), (1, 2, False), (0, 0, True), (0, 2, False))
    ],
    ('deform_conv_forward', deform_conv_forward),
    ('deform_conv_backward_input', deform_conv_backward_input),
    ('deform_conv_backward_parameters', deform_conv_backward_parameters),
    *[('modulated_deform_conv_forward', lambda n=n: modulated_deform_conv_forward(n)) for n in (0, 4)],
    *[('modulated_deform_conv_backward', lambda n=n: modulated_deform_conv_backward(n)) for n in (0, 4)],
    *[('psamask_forward', lambda k=k: psamask(False, k)) for k in (0, 1)],
    *[('psamask_backward', lambda k=k: psamask(True, k)) for k in (0, 1)],
]
CPU_ONLY: list[tuple[str, Callable[[], Call]]] = [
    *[('softnms', lambda m=m: softnms(m)) for m in (0, 1, 2)],
    ('nms_match', nms_match),
]
CUDA_ONLY: list[tuple[str, Callable[[], Call]]] = [
    *[(f'{kind}_focal_loss_{way}', lambda s=s, b=b: focal(s, b)) for kind, s in (('sigmoid', False), ('softmax', True))
      for way, b in (('forward', False), ('backward', True))],
    ('roi_pool_forward', roi_pool_forward),
    ('roi_pool_backward', roi_pool_backward),
    ('ms_deform_attn_forward', lambda: attention(False)),
    ('ms_deform_attn_backward', lambda: attention(True)),
    ('deform_roi_pool_forward', lambda: deform_roi_pool(False)),
    ('deform_roi_pool_backward', lambda: deform_roi_pool(True)),
    ('border_align_forward', border_align_forward),
    ('carafe_naive_forward', lambda: carafe_naive(False)),
    ('carafe_naive_backward', lambda: carafe_naive(True)),
    ('masked_im2col_forward', masked_im2col_forward),
    ('prroi_pool_forward', prroi_pool_forward),
]  # fmt: skip

# Scratch that the ops fill as they like: only these positions are not compared.
SCRATCH = {
    'deform_conv_forward': (4, 5),
    'deform_conv_backward_input': (6,),
    'deform_conv_backward_parameters': (4, 5),
    'modulated_deform_conv_forward': (3, 7),
    'modulated_deform_conv_backward': (3, 6),
}


def compare(name: str, make: Callable[[], Call], stand_in: ModuleType, device: str) -> None:
    compiled = importlib.import_module('mmcv._ext')
    args, options = make()
    outcomes = []
    for module in (compiled, stand_in):
        own = tuple(a.clone().to(device) if isinstance(a, Tensor) else a for a in args)
        returned = getattr(module, name)(*own, **options)
        kept = [a for i, a in enumerate(own) if i not in SCRATCH.get(name, ())]
        outcomes.append([*kept, returned])
    for expected, got in zip(*outcomes, strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert got == expected


@pytest.mark.parametrize(
    ('name', 'make'), BOTH + CPU_ONLY, ids=[f'{n}-{i}' for i, (n, _) in enumerate(BOTH + CPU_ONLY)]
)
def test_on_cpu(name: str, make: Callable[[], Call], stand_in: ModuleType) -> None:
    compare(name, make, stand_in, 'cpu')


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('name', 'make'), BOTH + CUDA_ONLY, ids=[f'{n}-{i}' for i, (n, _) in enumerate(BOTH + CUDA_ONLY)]
)
def test_on_cuda(name: str, make: Callable[[], Call], stand_in: ModuleType) -> None:
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    compare(name, make, stand_in, 'cuda')
