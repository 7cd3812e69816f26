"""Blocks as nodes on a GPU: as near to fp64 as the modules, the same bits twice, and from CUDA graphs."""

import pytest
import torch

from benchmarks.backbone import trunk
from mila_mm.nn import down_node

pytestmark = pytest.mark.gpu
ARCH = {'embed_dim': 64, 'depths': (1, 1, 1, 1), 'num_heads': (2, 4, 8, 16)}


def step(model, image, low):
    model.zero_grad(set_to_none=True)
    with torch.autocast('cuda', low or torch.bfloat16, enabled=low is not None):
        maps = model(image)
    fixed = torch.Generator('cuda').manual_seed(1)
    sum((m.double() * torch.randn(m.shape, generator=fixed, device='cuda')).sum() for m in maps).backward()
    return [m.detach() for m in maps], {name: p.grad for name, p in model.named_parameters()}


def made(fused, dtype=torch.float32):
    torch.manual_seed(0)
    return trunk(ARCH, 'auto', fused).to('cuda', dtype).train()  # also without timm


@pytest.fixture(params=['as it is', 'products'])
def matrices(request, monkeypatch):
    """Let the gradients of matrices come from kernels, or from products as those of large blocks do."""
    from mila_mm.ops.block import plan
    from mila_mm.ops.triton import configs

    if request.param == 'products':
        monkeypatch.setattr(configs, 'WEIGHT_GRADIENTS_FLOP', 0)
    plan.find.cache_clear()
    yield
    plan.find.cache_clear()


# The second has 12,288 tokens in the first stage, whose matrices' gradients are sums of several runs of rows.
@pytest.mark.parametrize('size', [(2, 93, 130), (2, 256, 384)], ids=str)
@pytest.mark.parametrize('low', [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.usefixtures('matrices')
def test_is_as_near_to_fp64_as_the_modules(low, size, monkeypatch):
    runs = []
    run = down_node.run
    monkeypatch.setattr(down_node, 'run', lambda *a: runs.append(1) or run(*a))
    plain, node, exact = made(False), made('auto'), made(False, torch.float64)
    for model in (node, exact):
        model.load_state_dict(plain.state_dict())
    image = torch.randn(size[0], 3, *size[1:], device='cuda')
    assert node.prepare(image) is not None
    maps, grads = step(exact, image.double(), None)
    theirs = step(plain, image, low)
    runs.clear()
    own = step(node, image, low)
    assert len(runs) == (0 if low is None else 3), 'the downsamplings are nodes under autocast'
    for i, m in enumerate(maps):
        error, other = ((each[0][i].double() - m).norm() / m.norm() for each in (own, theirs))
        assert error <= 2 * other + 1e-5
    scale = max(grad.norm().item() / grad.numel() ** 0.5 for grad in grads.values())
    for name, grad in grads.items():
        norm = grad.norm() + 1e-2 * scale * grad.numel() ** 0.5
        error, other = ((each[1][name].double() - grad).norm() / norm for each in (own, theirs))
        assert own[1][name].dtype == torch.float32
        assert error <= 2 * other + 3e-3, f'{name}: {error:.1e}, the modules {other:.1e}'


def test_the_same_bits_twice():
    model = made('auto').eval()
    image = torch.randn(2, 3, 64, 96, device='cuda')
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
        for a, b in zip(model(image), model(image), strict=True):
            assert torch.equal(a, b)


def test_trains_from_cuda_graphs():
    from mila_mm.nn.cuda_graphs import BackboneGraphs

    plain, graphed = made('auto'), made('auto')
    graphed.load_state_dict(plain.state_dict())
    graphed.forward = BackboneGraphs(graphed)
    for size in [(2, 3, 64, 96), (1, 3, 93, 130), (2, 3, 64, 96)]:
        image = torch.randn(size, device='cuda')
        (maps, grads), (expected_maps, expected) = (step(m, image, torch.bfloat16) for m in (graphed, plain))
        for a, b in zip(maps, expected_maps, strict=True):
            assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
        scale = max(grad.norm().item() for grad in expected.values())
        for name, grad in expected.items():
            assert (grads[name] - grad).norm() <= 2e-2 * grad.norm() + 1e-3 * scale, name
    for a, b in zip(graphed.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
