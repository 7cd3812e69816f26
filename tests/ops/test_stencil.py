"""``cpe_norm`` and ``dwc_silu`` on the CPU: specification, gradients, registration, dispatch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops import cpe_norm, cpe_norm_reference, dwc_silu, dwc_silu_reference

OPS = {'cpe_norm': (cpe_norm, cpe_norm_reference), 'dwc_silu': (dwc_silu, dwc_silu_reference)}
BOTH = pytest.mark.parametrize('name', OPS)
# batch, height, width, channels: odd, one row, one column, one token, square
SHAPES = [(2, 7, 11, 16), (1, 1, 13, 8), (1, 13, 1, 8), (1, 1, 1, 12), (3, 4, 4, 32)]


def draw(
    name: str,
    batch: int,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype = torch.float64,
    weight_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(batch, height * width, channels), (channels, 1, 3, 3), *[(channels,)] * (3 if name == 'cpe_norm' else 1)]
    x, *parameters = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype), *(p.to(weight_dtype or dtype) for p in parameters)]


def outputs(function, inputs: list[Tensor], size: tuple[int, int], **options: object) -> tuple[Tensor, ...]:
    result = function(*inputs, size, **options)
    return result if isinstance(result, tuple) else (result,)


def gradients(function, inputs: list[Tensor], size: tuple[int, int], **options: object) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    results = outputs(function, leaves, size, **options)
    random = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=random).to(y.dtype) for y in results]
    return *(y.detach() for y in results), *torch.autograd.grad(results, leaves, grads)


def by_the_formula(name: str, inputs: list[Tensor], height: int, width: int) -> tuple[Tensor, ...]:
    """Nine shifted products, in a loop over taps: independent of PyTorch's convolution and of its LayerNorm."""
    x, weight, bias, *norm = inputs
    grid = F.pad(x.unflatten(1, (height, width)), (0, 0, 1, 1, 1, 1))
    p = torch.zeros_like(x).unflatten(1, (height, width)) + bias
    for down in range(3):
        for right in range(3):
            p = p + weight[:, 0, down, right] * grid[:, down : down + height, right : right + width]
    p = p.flatten(1, 2)
    if not norm:
        return (p / (1 + (-p).exp()),)
    out = x + p
    centred = out - out.mean(-1, keepdim=True)
    return out, centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm[0] + norm[1]


@BOTH
@pytest.mark.parametrize('backend', ['auto', 'reference'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_is_the_formula(name: str, backend: str, shape: tuple[int, ...]) -> None:
    inputs, size = draw(name, *shape), shape[1:3]
    got = gradients(OPS[name][0], inputs, size, backend=backend)
    want = gradients(lambda *tensors: by_the_formula(name, list(tensors[:-1]), *size), inputs, size)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize('function', [0, 1], ids=['op', 'reference'])
def test_gradcheck(name: str, function: int) -> None:
    inputs = [t.requires_grad_() for t in draw(name, 1, 2, 3, 4)]
    assert torch.autograd.gradcheck(lambda *t: OPS[name][function](*t, (2, 3)), inputs, fast_mode=True)


@BOTH
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_16_bits_with_master_weights(name: str, dtype: torch.dtype) -> None:
    op, reference = OPS[name]
    inputs = draw(name, 2, 5, 7, 16, dtype, torch.float32)
    got = gradients(op, inputs, (5, 7))
    wide = gradients(reference, [t.double() for t in inputs], (5, 7))
    count = len(got) - len(inputs)
    assert all(y.dtype == dtype for y in got[: count + 1])
    assert all(grad.dtype == torch.float32 for grad in got[count + 1 :])
    for a, b in zip(got, wide, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < (2e-3 if dtype == torch.float16 else 2e-2)


@BOTH
def test_autocast_casts_what_goes_into_a_product(name: str) -> None:
    inputs = [t.requires_grad_() for t in draw(name, 2, 3, 5, 16, torch.float32)]
    for backend in ('auto', 'reference'):
        with torch.autocast('cpu', torch.bfloat16):
            results = outputs(OPS[name][0], inputs, (3, 5), backend=backend)
        assert results[-1].dtype == torch.bfloat16
        grads = torch.autograd.grad([y.float().square().sum() for y in results], inputs)
        assert all(grad.dtype == torch.float32 for grad in grads)
    if name == 'cpe_norm':
        exact = outputs(cpe_norm, inputs, (3, 5))
        assert torch.equal(results[0], exact[0]), 'the residual stream keeps its precision'


@BOTH
def test_layouts_and_expanded_gradients(name: str) -> None:
    op, _ = OPS[name]
    inputs = draw(name, 2, 3, 5, 16)
    want = gradients(op, inputs, (3, 5))
    x = inputs[0]
    half = torch.cat((x, x * float('nan')), -1).chunk(2, -1)[0]
    for strided in (half, x.transpose(1, 2).contiguous().transpose(1, 2)):
        for a, b in zip(gradients(op, [strided, *inputs[1:]], (3, 5)), want, strict=True):
            torch.testing.assert_close(a, b)
    leaves = [t.requires_grad_() for t in inputs]
    expanded = torch.autograd.grad([y.sum() for y in outputs(op, leaves, (3, 5))], leaves)
    results = outputs(op, leaves, (3, 5))
    dense = torch.autograd.grad(results, leaves, [torch.ones_like(y) for y in results])
    for a, b in zip(expanded, dense, strict=True):
        torch.testing.assert_close(a, b)


def test_one_output_of_two_may_be_unused() -> None:
    leaves = [t.requires_grad_() for t in draw('cpe_norm', 1, 3, 4, 8)]
    for index in (0, 1):
        got = torch.autograd.grad(cpe_norm(*leaves, (3, 4))[index].square().sum(), leaves, allow_unused=True)
        want = torch.autograd.grad(cpe_norm_reference(*leaves, (3, 4))[index].square().sum(), leaves, allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_what_is_kept_for_the_backward() -> None:
    def saved(function, inputs: list[Tensor]) -> int:
        own = {t.data_ptr() for t in inputs}
        kept: dict[int, int] = {}
        pack = lambda t: kept.setdefault(t.data_ptr(), t.numel()) and t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function(*inputs, (8, 8))
        return sum(count for pointer, count in kept.items() if pointer not in own)

    inputs = [t.requires_grad_() for t in draw('dwc_silu', 2, 8, 8, 32)]
    assert saved(dwc_silu, inputs) == 0
    inputs = [t.requires_grad_() for t in draw('cpe_norm', 2, 8, 8, 32)]
    assert saved(cpe_norm, inputs) == 2 * 64 * 32 + 2 * 2 * 64  # x', mean and rstd


@BOTH
@pytest.mark.parametrize('batch', [0, 2])
def test_opcheck(name: str, batch: int) -> None:
    namespace = torch.ops.mila_mm
    x, *parameters = draw(name, batch, 3, 5, 16, torch.float32)
    for variant in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        inputs = [
            t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (variant, *parameters)
        ]
        detached = [t.detach() for t in inputs]
        if name == 'cpe_norm':
            torch.library.opcheck(namespace.cpe_norm_forward, (*inputs, 3, 5, 1e-5, torch.bfloat16))
            out, y, mean, rstd = namespace.cpe_norm_forward(*detached, 3, 5, 1e-5, torch.float32)
            torch.library.opcheck(namespace.cpe_norm_backward, (out, y, *detached, out, mean, rstd, 3, 5))
        else:
            torch.library.opcheck(namespace.dwc_silu_forward, (*inputs, 3, 5))
            torch.library.opcheck(namespace.dwc_silu_backward, (detached[0], *detached, 3, 5))


@BOTH
def test_compiles_once_for_all_sizes(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def loss(*tensors: Tensor, size: tuple[int, int]) -> Tensor:
        return sum(y.square().sum() for y in outputs(OPS[name][0], list(tensors), size))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend='aot_eager')
    for size in [(6, 8), (7, 11), (9, 4)]:
        inputs = [t.requires_grad_() for t in draw(name, 2, *size, 16)]
        got = torch.autograd.grad(compiled(*inputs, size=size), inputs)
        for a, b in zip(got, torch.autograd.grad(loss(*inputs, size=size), inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


@BOTH
def test_a_second_differentiation_says_so(name: str) -> None:
    inputs = [t.requires_grad_() for t in draw(name, 1, 2, 3, 4)]
    first = torch.autograd.grad(outputs(OPS[name][0], inputs, (2, 3))[-1].square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f'{name}: expected one differentiation'):
        first[0].sum().backward()


@BOTH
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(backend='cuda'), 'backend to be one of auto, triton, reference'),
        (dict(size=(4, 6)), r'N = H \* W tokens for spatial_shape \(4, 6\), got 20'),
        (dict(x=torch.zeros(20, 8)), r'x of shape \(B, N, C\)'),
        (dict(weight=torch.zeros(8, 3, 3)), r'a weight of shape \(8, 1, 3, 3\), got \(8, 3, 3\)'),
        (dict(bias=torch.zeros(4)), r'bias of shape \(8,\), got \(4,\)'),
    ],
    ids=lambda value: '' if isinstance(value, str) else next(iter(value)),
)
def test_a_wrong_argument_says_expected_and_got(name: str, change: dict[str, object], message: str) -> None:
    x, weight, bias, *norm = draw(name, 1, 4, 5, 8, torch.float32)
    arguments = {'x': x, 'weight': weight, 'bias': bias, 'size': (4, 5), 'backend': 'auto', **change}
    with pytest.raises(ValueError, match=message):
        OPS[name][0](
            arguments['x'],
            arguments['weight'],
            arguments['bias'],
            *norm,
            arguments['size'],
            backend=arguments['backend'],
        )


@BOTH
def test_triton_by_name_on_the_cpu_says_why_not(name: str) -> None:
    inputs = draw(name, 1, 4, 5, 8, torch.float32)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: expected CUDA tensors, got cpu"):
        OPS[name][0](*inputs, (4, 5), backend='triton')
