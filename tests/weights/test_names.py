"""Names of weights: from the released code to ours and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mila_mm import MILA
from mila_mm.errors import UserError
from mila_mm.weights import (
    to_project,
    to_released,
)
from mila_mm.weights.names import backbone_prefix, describe


def test_names_go_both_ways(classifier, dense, detector):
    renamed, dropped = to_project(classifier)
    assert set(renamed) | {name for names in dropped.values() for name in names} == set(classifier)
    back = to_released(renamed, image_size=64)
    assert list(back) == ['model']
    assert set(back['model']) == set(classifier)
    for name, value in classifier.items():
        torch.testing.assert_close(back['model'][name], value, rtol=0, atol=0)
    whole = detector(dense)
    assert list(to_released(whole)) == ['state_dict']
    assert to_project(to_released(whole, image_size=224)['state_dict'])[0] == whole
    with pytest.raises(UserError, match='no MILA'):
        to_released({'conv1.weight': torch.ones(1)})
    with pytest.raises(UserError, match='multiple of 32'):
        to_released(whole, image_size=100)


def test_rope_tables_turn_like_the_model_does(classifier):
    """Rows turn the first half of the pairs, columns the second, at 10000 ** (-j / (C / 4))."""
    table = classifier['layers.1.blocks.0.attn.rope.rotations']
    assert table.shape == (8, 8, 16, 2)
    for row, column, pair in ((0, 0, 0), (3, 5, 2), (7, 1, 7), (2, 6, 8), (5, 4, 15)):
        angle = (row if pair < 8 else column) * 10000 ** (-(pair % 8) / 8)
        np.testing.assert_allclose(table[row, column, pair], [np.cos(angle), np.sin(angle)], atol=2e-6)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.sampled_from(['neck.a.weight', 'head.fc.bias', 'ema_x', 'layers.9.y', 'module.z', 'rope.rotations']),
        unique=True,
    ),
    st.sampled_from(['', 'backbone.', 'a.b.']),
)
def test_foreign_names_come_back_unchanged(names, prefix):
    weights = {prefix + name: torch.ones(1) for name in names}
    weights['anchor'] = torch.ones(1)  # no wrapper holds them all
    renamed, dropped = to_project(weights)
    assert list(renamed) == list(weights)
    assert not dropped
    assert backbone_prefix(renamed) is None


def test_archs_are_named(dense):
    assert describe(dense) == 'MILA custom (width 16, depths 1 1 2 1)'
    assert describe(MILA('tiny').state_dict()) == 'MILA tiny (width 64, depths 2 4 8 4)'
    assert describe(MILA('base', out_indices=(0, 1)).state_dict()) == 'MILA base (width 96, depths 3 6)'
