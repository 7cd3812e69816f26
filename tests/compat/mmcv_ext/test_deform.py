import math
from types import ModuleType

import numpy as np
import pytest
import torch
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    deform_conv2d,
    modulated_deform_conv2d,
)

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def sample(plane: np.ndarray, y: float, x: float) -> float:
    """Bilinear sample of a map that is 0 everywhere outside."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total += plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def deform_conv_by_loops(
    maps: np.ndarray,
    offset: np.ndarray,
    mask: np.ndarray | None,
    weight: np.ndarray,
    stride: Size,
    padding: Size,
    dilation: Size,
    groups: int,
    deform_groups: int,
) -> np.ndarray:
    (down, across), (above, left), (dy, dx) = (pair(size) for size in (stride, padding, dilation))
    batch, channels = maps.shape[:2]
    outputs, per_group, kh, kw = weight.shape
    high, wide = offset.shape[2:]
    out = np.zeros((batch, outputs, high, wide))
    for b, o, y, x in np.ndindex(out.shape):
        group = o // (outputs // groups)
        for c, i, j in np.ndindex(per_group, kh, kw):
            channel = group * per_group + c
            tap = (channel // (channels // deform_groups)) * kh * kw + i * kw + j
            at_y = y * down - above + i * dy + offset[b, 2 * tap, y, x]
            at_x = x * across - left + j * dx + offset[b, 2 * tap + 1, y, x]
            value = sample(maps[b, channel], at_y, at_x)
            out[b, o, y, x] += weight[o, c, i, j] * value * (1 if mask is None else mask[b, tap, y, x])
    return out


# Stride, padding, dilation, groups, deformable groups; a kernel of 3 x 3, of 3 x 2 where the name says so.
CASES: dict[str, tuple[Size, Size, Size, int, int]] = {
    'plain': (1, 1, 1, 1, 1),
    'strided': (2, 1, 1, 1, 1),
    'dilated': (1, 2, 2, 1, 1),
    'grouped': (1, 1, 1, 2, 1),
    'deform-grouped': (2, 0, 1, 1, 2),
    'both': (1, 1, 1, 2, 2),
    'rectangular': ((2, 1), (0, 1), (1, 2), 1, 2),
    'rectangular-across': ((1, 2), (1, 0), (2, 1), 2, 1),
}


def operands(case: str, dtype: torch.dtype = torch.double) -> tuple[torch.Tensor, ...]:
    *sizes, groups, deform_groups = CASES[case]
    kernel = (3, 2) if 'rectangular' in case else (3, 3)
    maps = torch.randn(2, 4, 5, 6, dtype=dtype)
    weight = torch.randn(4, 4 // groups, *kernel, dtype=dtype)
    high, wide = (
        (n + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        for n, taps, stride, padding, dilation in zip((5, 6), kernel, *map(pair, sizes), strict=True)
    )
    taps = math.prod(kernel)
    offset = torch.randn(2, 2 * deform_groups * taps, high, wide, dtype=dtype) * 1.5  # some reach far outside
    mask = torch.rand(2, deform_groups * taps, high, wide, dtype=dtype)
    return maps, offset, mask, weight, torch.randn(4, dtype=dtype)


@pytest.mark.parametrize('case', CASES)
def test_v1_equals_loops(case: str) -> None:
    maps, offset, _, weight, _ = operands(case)
    expected = deform_conv_by_loops(maps.numpy(), offset.numpy(), None, weight.numpy(), *CASES[case])
    torch.testing.assert_close(deform_conv2d(maps, offset, weight, *CASES[case]), torch.from_numpy(expected))


@pytest.mark.parametrize('case', CASES)
def test_v2_equals_loops(case: str) -> None:
    maps, offset, mask, weight, bias = operands(case)
    expected = deform_conv_by_loops(maps.numpy(), offset.numpy(), mask.numpy(), weight.numpy(), *CASES[case])
    with_bias = modulated_deform_conv2d(maps, offset, mask, weight, bias, *CASES[case])
    torch.testing.assert_close(with_bias, torch.from_numpy(expected) + bias[:, None, None])
    without = modulated_deform_conv2d(maps, offset, mask, weight, None, *CASES[case])
    torch.testing.assert_close(without, torch.from_numpy(expected))


@pytest.mark.parametrize('case', ['strided', 'both', 'rectangular', 'rectangular-across'])
def test_gradients(case: str) -> None:
    maps, offset, mask, weight, bias = (t.requires_grad_() for t in operands(case))
    v1 = lambda *t: deform_conv2d(*t, *CASES[case])  # noqa: E731
    v2 = lambda *t: modulated_deform_conv2d(*t, *CASES[case])  # noqa: E731
    assert torch.autograd.gradcheck(v1, (maps, offset, weight), fast_mode=True)
    assert torch.autograd.gradcheck(v2, (maps, offset, mask, weight, bias), fast_mode=True)


@pytest.mark.parametrize('wanted', ['maps', 'offset', 'weight'])
@pytest.mark.parametrize('case', ['plain', 'rectangular'])
def test_v1_gradient_of_one_operand_alone(case: str, wanted: str) -> None:
    maps, offset, _, weight, _ = operands(case)
    named = dict(maps=maps, offset=offset, weight=weight)
    every = [t.clone().requires_grad_() for t in named.values()]
    deform_conv2d(*every, *CASES[case]).square().sum().backward()
    named[wanted] = alone = named[wanted].clone().requires_grad_()
    deform_conv2d(*named.values(), *CASES[case]).square().sum().backward()
    torch.testing.assert_close(alone.grad, every[list(named).index(wanted)].grad)


def test_v1_backward_twice_gives_the_same() -> None:
    maps, offset, _, weight, _ = (t.requires_grad_() for t in operands('plain'))
    out = deform_conv2d(maps, offset, weight, *CASES['plain'])
    once = torch.autograd.grad(out.sum(), (maps, offset, weight), retain_graph=True)
    again = torch.autograd.grad(2 * out.sum(), (maps, offset, weight))
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_offsets_cast_the_rest_as_in_autocast(dtype: torch.dtype) -> None:
    maps, offset, mask, weight, bias = operands('plain', torch.float32)
    exact = modulated_deform_conv2d(maps, offset.to(dtype).float(), mask, weight, bias, *CASES['plain'])
    mixed = modulated_deform_conv2d(maps, offset.to(dtype), mask, weight, bias, *CASES['plain'])
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.float(), exact, rtol=3e-2, atol=1e-1)


def test_larger_offset_maps_are_read_as_they_lie_in_memory() -> None:
    # DyHead convolves a smaller level with the offsets of a larger one.
    maps, _, _, weight, bias = (t.requires_grad_() for t in operands('plain'))
    offset = torch.randn(2, 18, 10, 12, dtype=torch.double, requires_grad=True)
    mask = torch.rand(2, 9, 10, 12, dtype=torch.double, requires_grad=True)
    read = [t.flatten(1)[:, : t.shape[1] * 30].view(2, -1, 5, 6) for t in (offset, mask)]
    given = (maps, offset, mask, weight, bias)
    out = modulated_deform_conv2d(*given, *CASES['plain'])
    expected = modulated_deform_conv2d(maps, *read, weight, bias, *CASES['plain'])
    assert torch.equal(out, expected)
    direction = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, given, direction), torch.autograd.grad(expected, given, direction), strict=True
    ):
        torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=r'at least \(5, 6\)'):
        modulated_deform_conv2d(maps, offset[..., :3, :3], mask, weight, bias, 1, 1)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -3e38])
def test_offsets_that_are_no_places(value: float) -> None:
    # torchvision's CPU kernel ends the process on NaN.
    maps, offset, mask, weight, bias = operands('plain', torch.float32)
    plain = modulated_deform_conv2d(maps, offset, mask, weight, bias, 1, 1)
    broken = offset.clone()
    broken[0, 0, 2, 3] = value
    maps.requires_grad_()
    out = modulated_deform_conv2d(maps, broken, mask, weight, bias, 1, 1)
    here = torch.zeros(2, 1, 5, 6, dtype=torch.bool)
    here[0, :, 2, 3] = True
    assert torch.equal(out.isnan(), here.expand_as(out) & math.isnan(value))
    torch.testing.assert_close(out.detach()[~here.expand_as(out)], plain[~here.expand_as(out)])
    out.nansum().backward()


def test_zero_offsets_are_an_ordinary_convolution() -> None:
    maps, offset, mask, weight, bias = operands('plain', torch.float32)
    expected = torch.nn.functional.conv2d(maps, weight, bias, padding=1)
    still = torch.zeros_like(offset)
    torch.testing.assert_close(
        modulated_deform_conv2d(maps, still, torch.ones_like(mask), weight, bias, 1, 1), expected
    )
    torch.testing.assert_close(deform_conv2d(maps, still, weight, 1, 1) + bias[:, None, None], expected)


@pytest.mark.parametrize('kind', [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_packs_train_under_autocast(kind: type) -> None:
    layer = kind(4, 6, 3, padding=1, deform_groups=2)
    maps = torch.randn(2, 4, 9, 7, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(maps)
    assert out.shape == (2, 6, 9, 7)
    out.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
    assert layer.weight.grad.abs().sum() > 0 and maps.grad.abs().sum() > 0


def test_empty_batch(stand_in: ModuleType) -> None:
    # mmcv's Python refuses an empty batch; the op itself, called directly, does not.
    maps, weight, nothing = torch.zeros(0, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.zeros(0)
    offset, mask, output = torch.zeros(0, 18, 5, 5), torch.zeros(0, 9, 5, 5), torch.zeros(0, 6, 5, 5)
    ones = ('stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w', 'group', 'deformable_group')
    geometry = dict(kernel_h=3, kernel_w=3, **dict.fromkeys(ones, 1), with_bias=False)
    stand_in.modulated_deform_conv_forward(maps, weight, nothing, nothing, offset, mask, output, nothing, **geometry)
    assert output.shape == (0, 6, 5, 5)


@pytest.mark.parametrize('kind', [DeformConv2d, ModulatedDeformConv2d])
def test_modules_call_the_functions(kind: type) -> None:
    layer = kind(4, 6, 3, padding=1)
    maps, offset, mask, _, _ = operands('plain', torch.float32)
    if kind is DeformConv2d:
        assert torch.equal(layer(maps, offset), deform_conv2d(maps, offset, layer.weight, 1, 1))
    else:
        expected = modulated_deform_conv2d(maps, offset, mask, layer.weight, layer.bias, 1, 1)
        assert torch.equal(layer(maps, offset, mask), expected)
