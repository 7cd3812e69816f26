"""MILA's optimizer recipe on configs that have rules, schedules and optimizers of their own."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from mila_mm.swap import plan_swap
from mila_mm.swap.light import build, in_scope
from mila_mm.swap.recipe import apply_mila_recipe
from mila_mm.swap.result import Draft

RETINANET = "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n"
WARMUP = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500)


def with_recipe(schedule=None, lr=0.01, optimizer='SGD', **wrapper) -> Draft:
    """Apply the recipe, whose rate for detectors is 1e-4, to a config without a model."""
    config = dict(
        optim_wrapper=dict(optimizer=dict(type=optimizer, lr=lr), **wrapper),
        param_scheduler=schedule,
        auto_scale_lr=dict(base_batch_size=16),
    )
    draft = Draft(config)
    assert apply_mila_recipe(draft, 'mmdet') == (draft.config['optim_wrapper']['optimizer']['type'] == 'AdamW')
    return draft


@pytest.mark.parametrize(
    ('steps', 'expected', 'warm_up'),
    [
        ([dict(type='OneCycleLR', eta_max=0.01, total_steps=9)], [dict(eta_max=1e-4)], False),
        (
            [dict(type='CosineAnnealingLR', eta_min=1e-3), dict(type='CosineAnnealingMomentum', eta_min=0.85)],
            [dict(eta_min=1e-5), dict(eta_min=0.85)],
            True,
        ),
        ([dict(type='ReduceOnPlateauLR', min_value=1e-3)], [dict(min_value=1e-5)], True),
        ([dict(type='PolyParamScheduler', param_name='weight_decay', eta_min=0.5)], [dict(eta_min=0.5)], True),
        ([dict(type='LinearLR', start_factor=1.0, end_factor=0.01)], [{}], True),
        ([dict(type='LinearLR', start_factor=0.5, end_factor=0.1)], [{}], True),
        ([dict(type='LinearLR', begin=0, end=9)], [{}], False),
        ([dict(type='LinearLR', start_factor=0.1, begin=8, end=9)], [{}], True),
        ([dict(type='ConstantLR', factor=1.0)], [{}], True),
        ([dict(type='ConstantLR', factor=0.1)], [{}], False),
        ([dict(type='LinearMomentum', start_factor=0.1)], [{}], True),
        ([dict(type='mmdet.QuadraticWarmupLR', begin=0, end=5)], [{}], False),
    ],
    ids=[
        'one cycle',
        'momentum',
        'plateau',
        'weight decay',
        'decay',
        'decay from half',
        'warm-up',
        'later',
        'constant one',
        'constant low',
        'momentum rises',
        'quadratic',
    ],
)
def test_schedule(steps, expected, warm_up) -> None:
    """Only rates are scaled, and a warm-up comes in front only of what does not begin with one."""
    schedule = with_recipe(steps).config['param_scheduler']
    assert schedule[0] == WARMUP if warm_up else len(schedule) == len(steps)
    for step, before, rates in zip(schedule[warm_up:], steps, expected, strict=True):
        assert step == before | {key: pytest.approx(rate) for key, rate in rates.items()}


@pytest.mark.parametrize('kind', ['AdamW', 'NAdam', 'torch.optim.AdamW', 'RMSprop', torch.optim.AdamW])
def test_only_sgd_is_replaced(kind) -> None:
    draft = Draft(dict(optim_wrapper=dict(optimizer=dict(type=kind, lr=2e-4))))
    assert not apply_mila_recipe(draft, 'mmdet') and not draft.changes
    assert any('already' in unknown and 'they stay' in unknown for unknown in draft.unknowns)


@pytest.mark.parametrize('kind', ['SGD', 'torch.optim.SGD', torch.optim.SGD])
def test_sgd_by_any_name_is_replaced(kind) -> None:
    assert with_recipe(optimizer=kind).config['optim_wrapper']['optimizer']['type'] == 'AdamW'


def test_accumulated_batches_are_told() -> None:
    draft = with_recipe(accumulative_counts=4)
    assert draft.config['optim_wrapper']['optimizer']['lr'] == pytest.approx(1e-4)
    assert any('4 batches are accumulated' in unknown and '16 images' in unknown for unknown in draft.unknowns)
    assert not any('accumulated' in unknown for unknown in with_recipe(accumulative_counts=1).unknowns)


def groups_of(result, scope: str = 'mmdet') -> tuple[torch.nn.Module, dict[str, dict]]:
    """Build a swapped model without memory and its optimizer; return the group of each parameter."""
    model = build(result.config.model.to_dict(), scope, 'meta')
    cfg = result.config.optim_wrapper.copy()
    cfg.type = 'OptimWrapper'
    with in_scope(scope):
        groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    by_id = {id(p): group for group in groups for p in group['params']}
    return model, {name: by_id[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def norms_of(model: torch.nn.Module) -> set[str]:
    kinds = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.GroupNorm, torch.nn.LayerNorm)
    return {
        f'{name}.{kind}'
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for kind, _ in module.named_parameters(recurse=False)
    }


def test_the_rules_of_the_config_stay(tmp_path) -> None:
    path = tmp_path / 'mine.py'
    path.write_text(
        RETINANET
        + """
optim_wrapper = dict(paramwise_cfg=dict(
    bias_lr_mult=2.0, bypass_duplicate=True,
    custom_keys={'bbox_head': dict(lr_mult=10.0), 'backbone': dict(lr_mult=0.1), 'backbone.layer3': dict(lr_mult=0.5)}))
"""
    )
    result = plan_swap(str(path), 'nano', recipe='mila', whole_models=False)
    rules = result.config.optim_wrapper.paramwise_cfg
    assert rules.bypass_duplicate is True and 'backbone.layer3' not in rules.custom_keys
    assert any("'backbone.layer3'" in unknown and 'gone' in unknown for unknown in result.unknowns)
    assert any("norms under 'bbox_head'" in unknown for unknown in result.unknowns)
    model, groups = groups_of(result)
    norms = norms_of(model)
    for name, group in groups.items():
        part, kind = name.partition('.')[0], name.rpartition('.')[2]
        rate = {'backbone': 1e-5, 'bbox_head': 1e-3, 'neck': 2e-4 if kind == 'bias' else 1e-4}[part]
        assert group['lr'] == pytest.approx(rate), name
        assert group['weight_decay'] == pytest.approx(0.0 if name in norms else 0.05), name


def test_no_norm_decays_by_any_name() -> None:
    """Those of YOLOX's neck and heads are called bn."""
    result = plan_swap('mmdet::yolox/yolox_tiny_8xb8-300e_coco', 'nano', recipe='mila', whole_models=False)
    model, groups = groups_of(result)
    norms = norms_of(model)
    assert any('.bn.' in name for name in norms)
    assert all(
        (group['weight_decay'] == 0) == (name in norms or name.endswith('.bias')) for name, group in groups.items()
    )


def test_layer_wise_rates_of_sgd_become_those_of_mila(tmp_path) -> None:
    path = tmp_path / 'mine.py'
    path.write_text(
        RETINANET
        + """
optim_wrapper = dict(
    _delete_=True, type='AmpOptimWrapper', constructor='mmdet.LearningRateDecayOptimizerConstructor',
    optimizer=dict(type='SGD', lr=0.1), paramwise_cfg=dict(decay_rate=0.8, decay_type='layer_wise', num_layers=6))
"""
    )
    result = plan_swap(str(path), 'nano', recipe='mila', whole_models=False)
    assert result.config.optim_wrapper.type == 'AmpOptimWrapper'
    model, groups = groups_of(result)
    rates = [
        groups[f'backbone.{name}']['lr']
        for name in (
            'patch_embed.conv1.conv.weight',
            'layers.0.blocks.0.attn.qk.weight',
            'layers.3.blocks.0.attn.qk.weight',
        )
    ]
    assert rates == sorted(set(rates)) and groups['bbox_head.retina_cls.weight']['lr'] == pytest.approx(1e-4)
    norms = norms_of(model)
    assert all((group['weight_decay'] == 0) == (name in norms) for name, group in groups.items())
