"""A backbone launched from CUDA graphs; without a GPU a graph is one that runs its function again."""

import copy
import logging

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mila_mm import MILA
from mila_mm.engine.runner import model_options
from mila_mm.engine.runner.model_options import apply_model_options
from mila_mm.errors import UserError
from mila_mm.nn.cuda_graphs import BackboneGraphs, Graph, why_not_graphs

SMALL = dict(arch=dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2)), out_indices=(0, 1))


class Again:
    """As a CUDA graph: results are written where they were at the capture; what they were computed from is gone."""

    made, replayed, last = 0, 0, None

    def __init__(self, pool):
        assert pool == 'pool'
        Again.made += 1

    def capture(self, function):
        self.function, self.results, self.differentiable = function, function(), torch.is_grad_enabled()
        self.forward, Again.last = Again.last, self
        return self.results

    def replay(self):
        Again.replayed += 1
        if hasattr(self.function, 'args') and self.function.func.__name__ == '_differentiate':
            self.function.func(*self.function.args[:1], self.forward.fresh)
            return
        with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable):
            self.fresh = self.function()
        with torch.no_grad():
            for place, value in zip(self.results, self.fresh, strict=True):
                place.copy_(value)

    @staticmethod
    def pool():
        return 'pool'

    @staticmethod
    def warm_up(function):
        for _ in range(3):
            function()


def pair(device='cpu', graph=Again, shapes=8, **options):
    torch.manual_seed(0)
    plain = MILA(**SMALL, **options).to(device).train()
    twin = MILA(**SMALL, **options).to(device).train()
    twin.load_state_dict(plain.state_dict())
    twin.forward = BackboneGraphs(twin, shapes, graph)
    Again.made = Again.replayed = 0
    return plain, twin


def image(*size, device='cpu', seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device)


def backward(model, x, scale=1.0):
    maps = model(x)
    sum((scale * m.float().sin()).sum() for m in maps).backward()
    return [m.detach().clone() for m in maps]


def assert_same(plain, twin, rtol=1e-5):
    for (name, p), q in zip(plain.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            limit = rtol * (p.grad.abs().max().item() + 1)
            torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=limit, msg=lambda m, n=name: f'{n}: {m}')
    for (name, b), c in zip(plain.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f'{n}: {m}')


def check_training(plain, twin, device):
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in (plain, twin)]
    for i, size in enumerate([(1, 3, 32, 40), (2, 3, 45, 32), (1, 3, 32, 40), (1, 3, 32, 40)]):
        x = image(*size, device=device, seed=i)
        expected, got = backward(plain, x), backward(twin, x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert_same(plain, twin, 1e-4)
        if i != 2:  # two steps add their gradients up
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=i != 1)


def test_training_over_several_shapes():
    plain, twin = pair()
    check_training(plain, twin, 'cpu')
    assert Again.made == 4 and Again.replayed == 8


def test_inference_returns_maps_that_stay():
    plain, twin = pair()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            first = twin.eval()(image(1, 3, 32, 32))
            twin(image(1, 3, 32, 32, seed=1))
            for a, b in zip(first, plain.eval()(image(1, 3, 32, 32)), strict=True):
                torch.testing.assert_close(a, b)
    assert Again.made == 1 and Again.replayed == 4
    backward(twin.train(), image(1, 3, 32, 32))
    assert Again.made == 3


@pytest.mark.parametrize('fails_in', ['warm_up', 'forward', 'backward'])
def test_a_capture_that_fails_leaves_the_ordinary_way(fails_in, caplog, monkeypatch):
    class Failing(Again):
        def capture(self, function):
            results = super().capture(function)
            if fails_in == ('backward' if 'differentiate' in str(function.func) else 'forward'):
                raise RuntimeError('CUDA error: operation not permitted when stream is capturing\nand more')
            return results

        @staticmethod
        def warm_up(function):
            Again.warm_up(function)
            if fails_in == 'warm_up':
                raise torch.cuda.OutOfMemoryError('CUDA out of memory')

    with pytest.raises(RuntimeError, match='CUDA'):
        pair(graph=Failing)[1](image(1, 3, 32, 32))  # as the environment of the tests says
    monkeypatch.delenv('MILA_MM_KERNEL_ERRORS')
    plain, twin = pair(graph=Failing)
    check_training(plain, twin, 'cpu')
    assert Again.replayed == 0 and Again.made <= 2, 'not tried again'
    with torch.no_grad():
        for a, b in zip(twin.eval()(image(1, 3, 32, 32)), plain.eval()(image(1, 3, 32, 32)), strict=True):
            torch.testing.assert_close(a, b)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith('graph_backbone: runs without a CUDA graph: a capture failed (')
    assert '\n' not in caplog.messages[0]


def test_the_least_recently_used_shape_goes():
    _, twin = pair(shapes=2)
    with torch.no_grad():
        for side in (32, 36, 32, 40, 32, 36):
            twin(image(1, 3, side, 32))
    assert Again.made == 4  # 32, 36, 40 for 36, and 36 for 40


def test_what_changes_after_a_capture_is_captured_anew():
    plain, twin = pair()
    x = image(2, 3, 32, 32)
    for model in (plain, twin):
        backward(model, x)
        model.zero_grad()
        model.patch_embed.requires_grad_(False)
        model.layers[0].blocks[0].norm1.weight = nn.Parameter(torch.full((16,), 2.0))
        backward(model, x)
    assert_same(plain, twin)
    assert Again.made == 4
    with torch.no_grad():
        for model in (plain, twin):
            model.zero_grad()
            model.load_state_dict(
                {name: 1.1 * v if v.is_floating_point() else v for name, v in model.state_dict().items()}
            )
    for model in (plain, twin):
        backward(model, x)
    assert_same(plain, twin)
    assert Again.made == 4  # weights that are loaded in place need no other graph


def test_a_pass_before_the_backward_of_another_runs_without_a_graph(caplog):
    plain, twin = pair()
    x, y = image(1, 3, 32, 32), image(1, 3, 40, 32, seed=1)
    with caplog.at_level(logging.WARNING, 'mila_mm'):
        for model in (plain, twin):
            sum(m.sin().sum() for m in (*model(x), *model(y))).backward()
    assert_same(plain, twin)
    assert Again.replayed == 2 and 'before the backward' in caplog.text
    twin.zero_grad()
    twin(x)  # nobody asks for its backward
    backward(twin, x)
    assert Again.replayed == 5


@pytest.mark.parametrize('between', ['without gradients', 'after a change'])
def test_what_comes_between_a_pass_and_its_backward_leaves_its_gradients(between):
    plain, twin = pair()
    x, y = image(1, 3, 32, 32), image(1, 3, 40, 32, seed=1)
    for model in (plain, twin):
        with torch.no_grad():
            model(y)  # its graph is there by now
        maps = model(x)
        replayed = Again.replayed
        if between == 'after a change':
            model.norm1.weight.data = model.norm1.weight.data.clone()
        with torch.no_grad():
            model(y)
        assert Again.replayed == replayed  # all graphs write to one pool
        sum(m.sin().sum() for m in maps).backward()
    assert_same(plain, twin)
    assert any(p.grad is not None and p.grad.any() for p in twin.parameters())


def test_autocast_and_gradients_of_the_image():
    plain, twin = pair()
    grads = []
    for model in (plain, twin):
        x = image(1, 3, 32, 32).requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            maps = model(x)
        sum(m.float().sin().sum() for m in maps).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert_same(plain, twin)


def test_a_copy_has_graphs_of_its_own():
    _, twin = pair()
    other = copy.deepcopy(twin)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
        assert not other(image(1, 3, 32, 32))[0].any() and twin(image(1, 3, 32, 32))[0].any()


class Detector(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.backbone = MILA(**SMALL, **options)


def test_conditions_are_named(monkeypatch):
    def refusal(option=True, backbone=None, **cfg):
        model = Detector(**(backbone or {}))
        with pytest.raises(UserError) as error:
            apply_model_options(model, Config(dict(graph_backbone=option, **cfg)))
        return str(error.value)

    assert 'expected an NVIDIA GPU, got cpu' in refusal()
    monkeypatch.setattr(model_options, 'get_device', lambda: 'cuda')
    assert 'with_cp' in refusal(backbone=dict(with_cp=True))
    assert 'SyncBatchNorm' in refusal(backbone=dict(norm_cfg=dict(type='SyncBN')))
    assert 'compile_backbone' in refusal(compile_backbone=True)
    for wrong in ('yes', dict(shape=3), dict(shapes=0)):
        assert 'dict(shapes=N)' in refusal(wrong)
    model = Detector()
    apply_model_options(model, Config(dict(graph_backbone=dict(shapes=3))))
    assert isinstance(model.backbone.forward, BackboneGraphs)
    model.backbone.layers[0].blocks[0].mlp.register_forward_hook(lambda *_: None)
    assert 'layers.0.blocks.0.mlp has hooks' in why_not_graphs(model.backbone)
    twin = model.backbone
    twin.forward = BackboneGraphs(twin, 8, Again)
    with pytest.raises(UserError, match='has hooks'):
        twin(image(1, 3, 32, 32))


@pytest.mark.gpu
def test_training_on_a_gpu():
    plain, twin = pair('cuda', Graph)
    check_training(plain, twin, 'cuda')


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_a_gpu(dtype):
    plain, twin = pair('cuda', Graph, drop_path_rate=0.0)
    for size in [(2, 3, 64, 96), (1, 3, 75, 101), (2, 3, 64, 96)]:
        x = image(*size, device='cuda')
        for model in (plain, twin):
            model.zero_grad()
            with torch.autocast('cuda', dtype):
                backward(model, x)
        assert_same(plain, twin, 1e-2)
