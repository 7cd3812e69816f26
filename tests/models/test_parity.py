"""MILA computes what the released code computes, from weights under the released names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mila_mm.models import MILA

DATA = Path(__file__).resolve().parent.parent / 'data' / 'parity'
MICRO = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
OUTPUTS = np.load(DATA / 'outputs.npz')


def released_image(shape):
    return torch.from_numpy(np.random.default_rng(7).standard_normal(shape).astype(np.float32))


def assert_equal(maps, name, subsample=slice(None)):
    for i, got in enumerate(maps):
        expected = OUTPUTS[f'{name}_stage{i}']
        computed = got.numpy()[subsample]
        assert computed.shape == expected.shape
        error = np.abs(computed - expected).max() / np.abs(expected).max()
        assert error <= 1e-5, f'{name} stage {i}: {error:.2e} of the largest magnitude'


def test_state_dict_has_the_released_names_and_shapes():
    expected = {k: tuple(v) for k, v in json.loads((DATA / 'micro_dense_keys.json').read_text()).items()}
    got = {k: tuple(v.shape) for k, v in MILA(MICRO).state_dict().items()}
    assert got == expected


@pytest.mark.parametrize('backend', ['auto', 'reference'])
@pytest.mark.parametrize('size', [(64, 96), (75, 101), (4, 4), (33, 250)], ids=str)
@torch.no_grad()
def test_micro(size, backend, released_weights):
    model = MILA(MICRO, attn_backend=backend).eval()
    model.load_state_dict(released_weights(json.loads((DATA / 'micro_dense_keys.json').read_text())))
    assert_equal(model(released_image((2, 3, *size))), f'micro_{size[0]}x{size[1]}')


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
@torch.no_grad()
def test_published_size(arch, released_weights):
    model = MILA(arch).eval()
    model.load_state_dict(released_weights({k: v.shape for k, v in model.state_dict().items()}))
    every = np.s_[:, ::8, ::2, ::2]
    assert_equal(model(released_image((1, 3, 96, 160))), f'{arch}_96x160', every)


@torch.no_grad()
def test_classifier_logits(released_weights):
    """The classifier is the backbone with its own last norm, a mean over the tokens and a linear head."""
    keys = DATA.parents[1] / 'weights' / 'data' / 'micro_classifier_keys.json'
    shapes = json.loads(keys.read_text())
    weights = released_weights({k: v for k, v in shapes.items() if not k.endswith('rope.rotations')})
    model = MILA(MICRO, out_indices=(3,)).eval()
    model.load_state_dict(
        {
            k.replace('norm.', 'norm3.') if k.startswith('norm.') else k: v
            for k, v in weights.items()
            if not k.startswith('head.')
        }
    )
    pooled = model(released_image((2, 3, 64, 64)))[0].mean(dim=(2, 3))
    logits = torch.nn.functional.linear(pooled, weights['head.weight'], weights['head.bias']).numpy()
    expected = OUTPUTS['micro_cls_64x64_logits']
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(('arch', 'millions'), [('tiny', 23.880), ('small', 42.503), ('base', 95.216)])
def test_parameter_count(arch, millions):
    with torch.device('meta'):
        model = MILA(arch)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_the_yardstick_of_the_benchmarks_is_the_same_model(released_weights, monkeypatch):
    monkeypatch.syspath_prepend(DATA.parents[2])
    from benchmarks.transcription import TranscribedMILA

    yardstick = TranscribedMILA('tiny').eval()
    yardstick.load_state_dict(released_weights({k: v.shape for k, v in yardstick.state_dict().items()}))
    with torch.no_grad():
        assert_equal(yardstick(released_image((1, 3, 96, 160))), 'tiny_96x160', np.s_[:, ::8, ::2, ::2])
