"""Merged groups of parameters: few of them, the same training, and checkpoints from before resume."""

import copy
from pathlib import Path

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.optim.scheduler import LinearLR, MultiStepLR
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mila_mm import MILA
from mila_mm.engine.config.load import load_config, scope_of
from mila_mm.engine.optimizers import groups as room
from mila_mm.engine.optimizers.groups import merge_groups, regroup, use_fused

CONFIGS = Path(__file__).parents[3] / 'configs'
# Larger models and the study's other rows differ in nothing that makes groups.
SHIPPED = sorted(
    path
    for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.parts
    and not any(size in path.stem for size in ('mila_s_', 'mila_b_1x', 'mila_b_160k', 'mila_b_in1k'))
    and ('study' not in path.parts or 'rope_1' in path.stem)
)
PLAIN = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05))
NO_DECAY = {**PLAIN, 'paramwise_cfg': dict(custom_keys={'norm': dict(decay_mult=0.0)})}
LAYERED = {
    **PLAIN,
    'constructor': 'mila_mm.LayerDecayOptimWrapperConstructor',
    'paramwise_cfg': dict(layer_decay_rate=0.8, custom_keys={'norm': dict(decay_mult=0.0)}),
}
ARCH = dict(embed_dim=8, depths=(1, 2), num_heads=(1, 2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = MILA(ARCH, out_indices=(1,))
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return self.head(self.backbone(x)[0])


class Training:
    """A model, its optimizer and schedulers, as a runner holds them."""

    def __init__(self, cfg, merged):
        self.model = Model()
        self.wrapper = build_optim_wrapper(self.model, copy.deepcopy(cfg))
        self.groupings = merge_groups(self.wrapper) if merged else None
        self.schedulers = [
            LinearLR(self.wrapper, start_factor=0.1, begin=0, end=5, by_epoch=False),
            MultiStepLR(self.wrapper, milestones=[6, 12], gamma=0.1, begin=5, by_epoch=False),
        ]
        self.done = 0

    def run(self, steps):
        for _ in range(steps):
            images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(self.done))
            self.wrapper.update_params(self.model(images).square().mean())
            for scheduler in self.schedulers:
                scheduler.step()
            self.done += 1
        return self

    def checkpoint(self):
        return copy.deepcopy(
            dict(
                model=self.model.state_dict(),
                optimizer=self.wrapper.state_dict(),
                param_schedulers=[scheduler.state_dict() for scheduler in self.schedulers],
                done=self.done,
            )
        )

    def resume(self, checkpoint):
        checkpoint = regroup(copy.deepcopy(checkpoint), self.wrapper, self.groupings)
        self.model.load_state_dict(checkpoint['model'])
        self.wrapper.load_state_dict(checkpoint['optimizer'])
        for scheduler, state in zip(self.schedulers, checkpoint['param_schedulers'], strict=True):
            scheduler.load_state_dict(state)
        self.done = checkpoint['done']
        return self

    def groups(self):
        return self.wrapper.optimizer.param_groups


def assert_same_weights(a, b, rtol=1e-6):
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * y.abs().max().item(), msg=lambda m, n=name: f'{n}: {m}')


@pytest.mark.parametrize('cfg', [PLAIN, NO_DECAY, LAYERED], ids=['plain', 'no-decay', 'layered'])
def test_merged_groups_train_to_the_same_weights(cfg):
    one, other = Training(cfg, merged=True).run(20), Training(cfg, merged=False).run(20)
    assert_same_weights(one, other)
    assert one.wrapper.get_lr()['lr'][0] == other.wrapper.get_lr()['lr'][0]
    depths = 5
    assert len(one.groups()) == {'plain': 1, 'no-decay': 2}.get('plain' if cfg is PLAIN else 'no-decay') or (
        cfg is LAYERED and len(one.groups()) <= 2 * depths
    )


@pytest.mark.parametrize('cfg', [NO_DECAY, LAYERED], ids=['no-decay', 'layered'])
def test_a_checkpoint_with_a_group_for_each_parameter_resumes(cfg):
    old = Training(cfg, merged=False).run(7)
    checkpoint = old.checkpoint()
    assert len(checkpoint['optimizer']['param_groups']) > 40
    resumed = Training(cfg, merged=True).resume(checkpoint).run(13)
    assert_same_weights(resumed, old.run(13), rtol=1e-6)
    assert len(resumed.groups()) < 11
    rates = {id(p): group['lr'] for group in resumed.groups() for p in group['params']}
    names = {id(p): name for name, p in resumed.model.named_parameters()}
    expected = {id(p): group['lr'] for group in old.groups() for p in group['params']}
    by_name = {name: expected[id(p)] for name, p in old.model.named_parameters()}
    assert {names[i]: rate for i, rate in rates.items()} == pytest.approx(by_name)


def test_its_own_checkpoints_resume():
    whole = Training(LAYERED, merged=True).run(20)
    half = Training(LAYERED, merged=True).run(7).checkpoint()
    assert_same_weights(Training(LAYERED, merged=True).resume(half).run(13), whole, rtol=0)


def test_what_a_checkpoint_tells_apart_and_the_config_does_not_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(room, 'print_log', lambda text, **_: said.append(text))
    Training(NO_DECAY, merged=True).resume(Training(LAYERED, merged=False).run(1).checkpoint())
    assert any('initial_lr' in text for text in said)


def test_the_running_optimizer_says_how_it_computes():
    checkpoint = Training(NO_DECAY, merged=False).run(2).checkpoint()
    fused = {**NO_DECAY, 'optimizer': {**NO_DECAY['optimizer'], 'fused': True}}
    training = Training(fused, merged=True).resume(checkpoint)
    assert all(group['fused'] is True for group in training.groups())
    # PyTorch has it on CPUs too, so that the trajectory can be compared here.
    assert_same_weights(training.run(1), Training(NO_DECAY, merged=True).resume(checkpoint).run(1), rtol=1e-5)


def test_fused_is_taken_on_a_gpu_where_nobody_has_chosen(monkeypatch):
    model = nn.Linear(2, 2)

    def chosen(**optimizer):
        use_fused(optimizer, model)
        return optimizer.get('fused')

    assert chosen(type='AdamW') is None  # on a CPU
    monkeypatch.setattr(room, 'get_device', lambda: 'cuda')
    assert chosen(type='AdamW') is None  # the model is on the CPU
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    assert chosen(type='AdamW') is True and chosen(type=torch.optim.Adam) is True
    assert chosen(type='AdamW', foreach=False) is None and chosen(type='SGD') is None
    assert chosen(type='AdamW', fused=False) is False


def test_the_share_of_a_rank_under_zero_follows(tmp_path):
    if torch.distributed.is_initialized():
        pytest.skip('another test has left a process group')
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        optimizer = dict(type='ZeroRedundancyOptimizer', optimizer_type='AdamW', lr=1e-2, weight_decay=0.05)
        cfg = {**LAYERED, 'optimizer': optimizer}
        old = Training(cfg, merged=False).run(7)
        new = Training(cfg, merged=True).resume(old.checkpoint()).run(13)
        assert len(new.wrapper.optimizer.optim.param_groups) == len(new.groups()) < 11
        assert_same_weights(new, old.run(13))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_have_few_groups(path):
    cfg = load_config(str(path), [])
    with DefaultScope.overwrite_default_scope(scope_of(cfg)), torch.device('meta'):
        model = MODELS.build(cfg.model)
    wrapper_cfg = copy.deepcopy(cfg.optim_wrapper)
    wrapper_cfg.type = 'OptimWrapper'
    if wrapper_cfg.optimizer.type == 'ZeroRedundancyOptimizer':  # needs processes; its groups are made alike
        wrapper_cfg.optimizer.type = wrapper_cfg.optimizer.pop('optimizer_type')
    for key in ('dtype', 'loss_scale', 'use_fsdp'):
        wrapper_cfg.pop(key, None)
    wrapper = build_optim_wrapper(model, wrapper_cfg)
    before = sum(len(group['params']) for group in wrapper.optimizer.param_groups)
    merge_groups(wrapper)
    groups = wrapper.optimizer.param_groups
    layered = 'layer_decay_rate' in (cfg.optim_wrapper.get('paramwise_cfg') or {})
    assert len(groups) <= (2 * model.backbone.get_layer_depth('norm3.weight')[1] if layered else 16)
    assert sum(len(group['params']) for group in groups) == before == len({p for g in groups for p in g['params']})
