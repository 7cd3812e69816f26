"""Each layer against its formula, written out with torch's functions in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mila_mm.nn.layers import (
    Block,
    ConvLayer,
    DepthwiseConv,
    Downsample,
    LinearAttention,
    Mlp,
    Stem,
    add_branch,
    pad_to_multiple,
)
from mila_mm.ops import mila_attention


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a value of its own, every norm another eps; in fp64."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.5 + 0.1)
                tensor.sub_(0.3 if tensor.dim() > 1 else 0)
    for i, part in enumerate(module.modules()):
        if hasattr(part, 'eps'):
            part.eps = 1e-3 * (i + 1)
    return module


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(2).transpose(1, 2)


def conv(layer: ConvLayer, x: torch.Tensor, stride: int = 1, relu: bool = True, groups: int = 1) -> torch.Tensor:
    """Convolution, batch norm, ReLU by their definitions."""
    y = F.conv2d(x, layer.conv.weight, layer.conv.bias, stride, layer.conv.weight.shape[-1] // 2, groups=groups)
    if (norm := layer.norm) is not None:
        mean, var = (y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False))
        if not norm.training:
            mean, var = norm.running_mean.clone(), norm.running_var.clone()
        shape = (1, -1, 1, 1)
        y = (y - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.clamp(min=0) if relu else y


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 11), st.integers(1, 11), st.sampled_from((2, 4)))
def test_padding_is_zeros_on_the_right_and_at_the_bottom(height, width, multiple):
    x = torch.rand(2, 3, height, width) + 1
    y = pad_to_multiple(x, multiple)
    assert all(
        side % multiple == 0 and 0 <= side - old < multiple for side, old in zip(y.shape[2:], x.shape[2:], strict=True)
    )
    assert torch.equal(y[:, :, :height, :width], x)
    assert not y[:, :, height:].any() and not y[:, :, :, width:].any()


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('act', [False, True])
@pytest.mark.parametrize('normed', [False, True])
def test_convolution_norm_relu(training, bias, act, normed):
    layer = randomised(
        ConvLayer(4, 6, 3, 2, groups=2, bias=bias, norm_layer=nn.BatchNorm2d if normed else None, act=act)
    ).train(training)
    x = images(2, 4, 7, 10)
    expected = conv(layer, x, 2, act, groups=2)
    torch.testing.assert_close(layer(x), expected)


def test_a_norm_of_another_kind_is_not_folded():
    layer = randomised(ConvLayer(3, 4, 3, norm_layer=lambda dim: nn.GroupNorm(2, dim))).eval()
    x = images(2, 3, 5, 6)
    plain = F.conv2d(x, layer.conv.weight, layer.conv.bias, padding=1)
    norm = layer.norm
    torch.testing.assert_close(layer(x), F.group_norm(plain, 2, norm.weight, norm.bias, norm.eps).relu())


@pytest.mark.parametrize('where', ['conv', 'norm'])
@pytest.mark.parametrize('kind', ['register_forward_hook', 'register_forward_pre_hook'])
def test_hooks_of_a_convolution_and_its_norm_are_called(where, kind):
    layer = randomised(ConvLayer(3, 4, 3, norm_layer=nn.BatchNorm2d)).eval()
    x, called = images(1, 3, 4, 5), []
    folded = layer(x)
    getattr(getattr(layer, where), kind)(lambda *_: called.append(where))
    torch.testing.assert_close(layer(x), folded)
    assert called == [where]


@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_depthwise_convolution_on_tokens(kernel_size, residual, dtype):
    layer = randomised(DepthwiseConv(5, kernel_size))
    image = images(2, 5, 4, 7)
    expected = F.conv2d(image, layer.weight, layer.bias, padding=kernel_size // 2, groups=5)
    expected = expected + image if residual else expected
    with torch.no_grad():
        result = layer.to(dtype)(tokens(image).to(dtype), 4, 7, residual=residual)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(result.double(), tokens(expected), rtol=tolerance, atol=tolerance)


def test_a_sum_without_gradients_may_reuse_the_branch_and_never_the_shortcut():
    branch, shortcut = torch.rand(2, 3), torch.rand(2, 3)
    expected, kept = branch + shortcut, shortcut.clone()
    with torch.no_grad():
        assert torch.equal(add_branch(branch.clone(), shortcut), expected)
        assert add_branch(branch.bfloat16(), shortcut).dtype == torch.float32
    assert torch.equal(shortcut, kept)
    branch.requires_grad_()
    assert torch.equal(add_branch(branch, shortcut), expected) and torch.equal(branch + shortcut, expected)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('size', [(8, 12), (5, 9), (1, 2)])
def test_stem(training, size):
    stem = randomised(Stem(3, 6, nn.BatchNorm2d)).train(training)
    height, width = (-(-side // 4) for side in size)
    x = images(2, 3, *size)
    padded = x.new_zeros(2, 3, 4 * height, 4 * width)
    padded[:, :, : size[0], : size[1]] = x
    y = conv(stem.conv1, padded, 2)
    y = y + conv(stem.conv2[1], conv(stem.conv2[0], y), relu=False)
    expected = conv(stem.conv3[1], conv(stem.conv3[0], y, 2), relu=False)
    result, *grid = stem(x)
    assert grid == [height, width] == list(expected.shape[2:])
    torch.testing.assert_close(result, tokens(expected))


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('size', [(4, 6), (3, 5), (1, 1)])
def test_downsampling_pads_before_the_first_convolution(recompute, size):
    layer = randomised(Downsample(4, nn.BatchNorm2d)).eval()
    height, width = ((side + 1) // 2 for side in size)
    image = images(2, 4, *size)
    padded = image.new_zeros(2, 4, 2 * height, 2 * width)
    padded[:, :, : size[0], : size[1]] = image
    first, second, third = layer.conv
    expected = conv(third, conv(second, conv(first, padded), 2, groups=32), relu=False)
    result, *grid = layer(tokens(image), *size, recompute)
    assert grid == [height, width]
    torch.testing.assert_close(result, tokens(expected))


@pytest.mark.parametrize('fused', [(), ('cpe_norm', 'dwc_silu', 'projections')])
@pytest.mark.parametrize('cpe', [False, True])
@pytest.mark.parametrize('mlp_ratio', [0, 2])
def test_block(fused, cpe, mlp_ratio):
    """Figure 3 of the paper: positions, norm, two projections, the attention between convolution and gate, MLP."""
    size, dim = (3, 4), 8
    block = randomised(
        Block(dim, lambda width: LinearAttention(width, 2, 'reference'), mlp_ratio, 0.5, cpe=cpe, fused=fused)
    ).eval()
    image = images(2, dim, *size)

    def depthwise(part, x):
        y = F.conv2d(x.transpose(1, 2).unflatten(2, size), part.weight, part.bias, padding=1, groups=dim)
        return tokens(y)

    def norm(part, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + part.eps).sqrt()
        return x * part.weight + part.bias

    def linear(part, x):
        return x @ part.weight.T + part.bias

    x = tokens(image)
    x = x + depthwise(block.cpe1, x) if cpe else x
    y = norm(block.norm1, x)
    u = depthwise(block.dwc, linear(block.in_proj, y))
    u = u * u.sigmoid()
    attn = block.attn
    attended = mila_attention(linear(attn.qk, u), u, attn.lepe.weight, attn.lepe.bias, size, 2, backend='reference')
    gate = linear(block.act_proj, y)
    x = x + linear(block.out_proj, attended * gate * gate.sigmoid())
    if mlp_ratio:
        assert block.mlp.fc1.weight.shape == (mlp_ratio * dim, dim)
        x = x + depthwise(block.cpe2, x) if cpe else x
        x = x + linear(block.mlp.fc2, F.gelu(linear(block.mlp.fc1, norm(block.norm2, x))))
    torch.testing.assert_close(block(tokens(image), *size), x, rtol=1e-9, atol=1e-9)


def test_mlp():
    mlp = randomised(Mlp(3, 5))
    x = images(2, 4, 3)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)
