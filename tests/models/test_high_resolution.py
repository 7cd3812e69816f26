"""What high resolution needs: activation checkpointing, channels_last, compilation of the backbone."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mila_mm import MILA
from mila_mm.engine.runner.model_options import apply_model_options
from mila_mm.errors import UserError

SMALL = dict(arch=dict(embed_dim=16, depths=(2, 1), num_heads=(1, 2)), out_indices=(0, 1))


def step(model, image, loss, amp=None):
    """Outputs, gradients and running statistics of one training step."""
    torch.manual_seed(1)  # drop path
    with torch.autocast('cpu', amp or torch.bfloat16, enabled=amp is not None):
        maps = model(image)
    torch.manual_seed(2)  # a backward that computes again draws as the forward did
    loss(maps).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return maps, gradients, {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize('amp', [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize('with_cp', [True, 'block', 'stage'])
def test_checkpointing_changes_nothing(with_cp, amp, weighted_sum, same_gradients):
    torch.manual_seed(0)
    plain = MILA(**SMALL, drop_path_rate=0.5).train()
    saving = MILA(**SMALL, drop_path_rate=0.5, with_cp=with_cp).train()
    saving.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 43, 62)
    expected, got = (step(model, image, weighted_sum, amp) for model in (plain, saving))
    same_gradients(got[1], expected[1], 0)
    for a, b in zip(expected, got, strict=True):
        pairs = zip(a, b, strict=True) if isinstance(a, tuple) else ((a[key], b[key]) for key in a)
        for x, y in pairs:
            torch.testing.assert_close(y, x, rtol=0, atol=0)


def saved_bytes(with_cp, monkeypatch):
    """What stays allocated between forward and backward, beyond the parameters."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    # newer torch looks at what it has drawn, which fake tensors have not; the values do not matter here
    monkeypatch.setattr(nn.init, 'trunc_normal_', lambda tensor, **_: tensor)
    with FakeTensorMode():
        model = MILA(**SMALL, with_cp=with_cp).train()
        image = torch.randn(1, 3, 256, 256)
        tracker = MemTracker()
        tracker.track_external(model, image)
        with tracker:
            maps = model(image)
            snapshot = tracker.get_tracker_snapshot('current')
            del maps
    return next(iter(snapshot.values()))['Total']


def test_checkpointing_stores_less(monkeypatch):
    plain, block, stage = (saved_bytes(with_cp, monkeypatch) for with_cp in (False, 'block', 'stage'))
    assert stage < block < 0.6 * plain


def test_wrong_checkpointing_is_refused():
    with pytest.raises(ValueError, match=r"expected with_cp to be False, True, 'block' or 'stage', got 'blocks'"):
        MILA(**SMALL, with_cp='blocks')


def plain_names(model):
    """Parameters under the names that checkpoints have."""
    return [(name.replace('_orig_mod.', ''), parameter) for name, parameter in model.named_parameters()]


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = MILA(**(SMALL | dict(arch=dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2)))))
        self.neck = nn.Conv2d(32, 4, 1)

    def forward(self, x):
        first, second = self.backbone(x)
        return self.neck(second) + first.mean()


@pytest.mark.parametrize('compiled', [False, True])
def test_options_change_nothing_but_the_way(compiled, weighted_sum, same_gradients):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    options = dict(channels_last=True) | (dict(compile_backbone=dict(backend=backend)) if compiled else {})
    plain, optioned = Detector().train(), apply_model_options(Detector().train(), options)
    assert plain.state_dict().keys() == optioned.state_dict().keys(), 'checkpoints fit'
    for size in ((64, 96), (75, 101)):
        image = torch.randn(2, 3, *size)
        results = []
        for model in (plain, optioned):
            model.zero_grad()
            y = model(image)
            weighted_sum([y]).backward()
            results.append((y, {name: p.grad for name, p in plain_names(model)}))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
        same_gradients(results[1][1], results[0][1], 1e-3)
        assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    assert bool(graphs) == compiled


@pytest.mark.parametrize('before', [True, False])
def test_programs_for_changing_sizes_are_not_split_for_the_exchange_of_gradients(before):
    config = torch._dynamo.config
    with config.patch(optimize_ddp=before):
        apply_model_options(Detector(), Config(dict(compile_backbone=dict(backend='eager', dynamic=False))))
        assert config.optimize_ddp == before, "the user's own choice"
        apply_model_options(Detector(), Config(dict(compile_backbone=dict(backend='eager'))))
        assert config.optimize_ddp is False


def test_options_without_a_backbone_are_refused():
    with pytest.raises(UserError, match='channels_last: the model Linear has no backbone'):
        apply_model_options(nn.Linear(2, 2), Config(dict(channels_last=True)))
    with pytest.raises(UserError, match='compile_backbone: expected True'):
        apply_model_options(Detector(), Config(dict(compile_backbone='max')))
