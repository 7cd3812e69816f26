"""Layer-wise learning rates: which parameter learns how fast."""

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from mila_mm import MILA
from mila_mm.errors import UserError

ARCH = dict(embed_dim=8, depths=(1, 2), num_heads=(1, 2))
# Stem, one block for each of the three, output norms: five depths.
DEPTHS = {
    'backbone.patch_embed.': 0,
    'backbone.layers.0.blocks.0.': 1,
    'backbone.layers.0.downsample.': 1,
    'backbone.layers.1.blocks.0.': 2,
    'backbone.layers.1.blocks.1.': 3,
    'backbone.norm1.': 4,
    'head.': 4,
}
RATE, LR = 0.5, 0.32


class Model(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = MILA(ARCH, out_indices=(1,)) if backbone is None else backbone
        self.head = nn.Conv2d(16, 3, 1)


def groups(model, **paramwise):
    """The settings of each parameter, by its name."""
    cfg = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=0.1),
        constructor='mila_mm.LayerDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=RATE) | paramwise,
    )
    names = {id(p): name for name, p in model.named_parameters()}
    wrapper = build_optim_wrapper(model, cfg)
    return {names[id(p)]: group for group in wrapper.optimizer.param_groups for p in group['params']}


def test_every_layer_learns_by_its_depth():
    found = groups(Model())
    seen = set()
    for name, group in found.items():
        prefix = next(prefix for prefix in DEPTHS if name.startswith(prefix))
        seen.add(prefix)
        assert group['lr'] == pytest.approx(LR * RATE ** (4 - DEPTHS[prefix])), name
        assert group['weight_decay'] == 0.1
    assert seen == set(DEPTHS)
    assert set(found) == {name for name, _ in Model().named_parameters()}


def test_other_options_go_beside_it():
    keys = {'norm': dict(decay_mult=0.0), 'patch_embed': dict(lr_mult=0.1), 'head': dict(lr_mult=2.0)}
    found = groups(Model(), custom_keys=keys)
    assert found['backbone.patch_embed.conv1.conv.weight']['lr'] == pytest.approx(0.1 * LR * RATE**4)
    assert found['head.weight']['lr'] == pytest.approx(2 * LR)
    norm, product = (found[f'backbone.layers.0.blocks.0.{name}.weight'] for name in ('norm1', 'in_proj'))
    assert (norm['weight_decay'], product['weight_decay']) == (0.0, 0.1)
    assert norm['lr'] == product['lr'] == pytest.approx(LR * RATE**3)


@pytest.mark.parametrize('rate', [None, 0, -1, 1.5, '0.8', True])
def test_what_is_no_rate(rate):
    with pytest.raises(UserError, match='layer_decay_rate: expected a number in'):
        groups(Model(), layer_decay_rate=rate)


def test_a_backbone_without_depths_is_refused():
    with pytest.raises(UserError, match='no backbone with get_layer_depth'):
        groups(Model(nn.Conv2d(3, 16, 1)))
