"""What the study's figures show is what the model computes, and what is drawn is there."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mila_mm import MILA, LinearAttentionTransformer
from mila_mm.errors import UserError
from mila_mm.study.figures.comparison import _style
from mila_mm.study.figures.draw import (
    forgotten_after,
    save_decay_windows,
    save_gate_maps,
    save_layer_curves,
    save_receptive_fields,
)
from mila_mm.study.figures.probes import (
    GateMap,
    LayerValue,
    area_ratios,
    blocks_of,
    effective_receptive_field,
    forget_gates,
    input_gates,
    token_length_std,
)

MICRO = dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2))


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def gated():
    torch.manual_seed(0)
    return LinearAttentionTransformer(MICRO, input_gate=True, forget_gate=True, out_indices=(0, 1)).eval()


def drawn(path):
    """The picture as (H, W, 3), and that it is not empty."""
    picture = cv2.imread(str(path))
    assert picture is not None and picture.std() > 5 and min(picture.shape[:2]) > 200
    return picture


@torch.no_grad()
def test_token_lengths_are_those_behind_each_block():
    torch.manual_seed(0)
    model, batch = MILA(MICRO, out_indices=(0, 1)).eval(), images(2, 3, 40, 24)
    x, height, width = model.patch_embed(batch)
    expected = []
    for stage in model.layers:
        for block in stage.blocks:
            x = block(x, height, width)
            expected.append(x.norm(dim=-1).std(dim=1, correction=0).mean().item())
        if stage.downsample is not None:
            x, height, width = stage.downsample(x, height, width)
    # image by image, as batches
    values = token_length_std(model, model, [batch[:1], batch[1:]])
    assert [(v.stage, v.block) for v in values] == [(0, 0), (1, 0), (1, 1)]
    assert [v.value for v in values] == pytest.approx(expected, rel=1e-4)
    assert all(v.low <= v.value <= v.high for v in values)
    assert not any(block._forward_hooks for _, _, block in blocks_of(model)), 'no hook is left behind'


@torch.no_grad()
def test_forget_gates_are_the_mean_of_exp_of_a_times_delta(gated):
    batch, seen = images(2, 3, 32, 48), []
    handle = gated.layers[0].blocks[0].attn.forget_gate.register_forward_hook(lambda m, args, out: seen.append(out))
    values = forget_gates(gated, gated, [batch])
    handle.remove()
    delta, a = seen[0]
    full = (a * delta[:, :, None]).exp()  # (B, N, d, C)
    assert values[0].value == pytest.approx(full.mean().item(), rel=1e-4)
    assert values[0].low == pytest.approx(full.mean(2).quantile(0.1).item(), rel=1e-3)
    assert len(values) == 3 and all(0 < v.low <= v.value <= v.high < 1 for v in values)


@torch.no_grad()
def test_input_gates_lie_over_the_image(gated):
    batch, seen = images(2, 3, 32, 48), []
    handle = gated.layers[1].blocks[1].attn.input_gate.register_forward_hook(lambda m, args, out: seen.append(out))
    gates = input_gates(gated, gated, batch)
    handle.remove()
    assert [(g.stage, g.block, g.maps.shape) for g in gates] == [
        (0, 0, (2, 8, 12)),
        (1, 0, (2, 4, 6)),
        (1, 1, (2, 4, 6)),
    ]
    # tokens run row by row
    assert gates[2].maps[1, 2, 5] == pytest.approx(seen[0][1, 2 * 6 + 5].mean().item(), rel=1e-5)
    assert all((g.maps > 0).all() for g in gates)


def test_models_without_gates_or_blocks_are_refused():
    plain = LinearAttentionTransformer(MICRO, out_indices=(0, 1)).eval()
    for probe, what in ((forget_gates, 'forget_gate=True'), (input_gates, 'input_gate=True')):
        with pytest.raises(UserError, match=what):
            probe(plain, plain, [images(1, 3, 32, 32)] if probe is forget_gates else images(1, 3, 32, 32))
    with pytest.raises(UserError, match=r'Conv2d.*LinearAttentionTransformer'):
        token_length_std(nn.Conv2d(3, 4, 3), lambda x: [x], [])


@pytest.mark.parametrize('side', [9, 10])
def test_receptive_field_of_a_convolution_is_its_kernel(side):
    conv = nn.Conv2d(3, 1, 3, padding=1)
    field = effective_receptive_field(lambda x: [conv(x)], [images(2, 3, side, side)])
    kernel = conv.weight.detach().double()[0].abs().sum(0).numpy()
    expected = np.zeros((side, side))
    if side % 2:
        expected[3:6, 3:6] = kernel
        np.testing.assert_allclose(field, expected / expected.sum(), rtol=1e-5, atol=1e-9)
    assert field.sum() == pytest.approx(1)
    rows, columns = np.nonzero(field)
    reach = 3 if side % 2 else 4  # the middle of an even side is two pixels wide
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == reach


def test_receptive_field_of_another_stage_and_of_nothing():
    def maps(x):
        return [x[:, :, ::2, ::2], x.mean(dim=(2, 3), keepdim=True)]

    batch = images(3, 3, 9, 7)
    spread = effective_receptive_field(maps, [batch[:2], batch[2:]])
    np.testing.assert_allclose(spread, np.full((9, 7), 1 / 63), rtol=1e-5)
    assert (effective_receptive_field(maps, [batch], stage=0) > 0).sum() == 2  # 5 x 4 outputs: one row, two columns
    with pytest.raises(UserError, match='0 to 1, got 2'):
        effective_receptive_field(maps, [batch], stage=2)
    with pytest.raises(UserError, match='zero'):
        effective_receptive_field(lambda x: [0 * x], [batch])


def test_receptive_field_behind_a_fresh_layer_norm_is_no_rounding_error():
    # The channels of a LayerNorm with equal weights sum up to zero, whatever the image.
    torch.manual_seed(0)
    model = MILA('nano').eval()
    batches = [images(4, 3, 96, 96)]
    single = effective_receptive_field(model, batches)
    double = effective_receptive_field(model.double(), [batch.double() for batch in batches])
    np.testing.assert_allclose(single, double, rtol=1e-2)
    assert (single > 0).all(), 'linear attention sees the whole image'
    assert all(p.grad is None for p in model.parameters())


def test_area_ratios_of_known_fields():
    uniform = np.ones((30, 30))
    assert area_ratios(uniform, (0.25, 1.0)) == pytest.approx([16 * 16 / 900, 1.0])
    point = np.zeros((31, 21))
    point[15, 10] = 1
    assert area_ratios(point) == [1 / (31 * 21)] * 4
    corner = np.zeros((8, 8))
    corner[0, 0] = 1
    assert area_ratios(corner, (0.5,)) == [1.0]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16))
@settings(deadline=None, max_examples=25)
def test_area_ratios_rise_with_the_threshold(height, width, seed):
    field = np.random.default_rng(seed).random((height, width)) + 1e-3
    ratios = area_ratios(field, (0.1, 0.5, 0.9, 1.0))
    assert ratios == sorted(ratios) and ratios[0] > 0 and ratios[-1] <= 1


def test_windows_of_constant_gates(tmp_path):
    for gate, tokens in ((0.2, 3), (0.6, 10), (0.8, 21)):
        assert forgotten_after(gate) == tokens
        assert gate**tokens < 0.01 <= gate ** (tokens - 1)
    save_decay_windows(tmp_path / 'decay.png')
    drawn(tmp_path / 'decay.png')
    with pytest.raises(ValueError, match=r'\(0, 1\)'):
        save_decay_windows(tmp_path / 'no.png', (0.5, 1.0))


def curve(*values):
    return [LayerValue(stage, 0, v, 0.8 * v, 1.2 * v) for stage, v in enumerate(values)]


def test_curves_in_the_colour_of_each_model(tmp_path):
    path = tmp_path / 'curves.png'
    save_layer_curves({'with': curve(1, 2, 3), 'without': curve(10, 200, 3000)}, path, 'std', log=True)
    blue, green, red = drawn(path).astype(int).transpose(2, 0, 1)
    first, second = (blue - red > 100) & (green > 60), (red - blue > 120) & (green < 120)
    rows = [np.flatnonzero(mask[:, : mask.shape[1] // 2].any(axis=1)) for mask in (first, second)]
    assert rows[1].mean() < rows[0].mean(), 'the larger values lie above'
    with pytest.raises(ValueError, match='2 different depths'):
        save_layer_curves({'a': curve(1, 2), 'b': curve(1, 2, 3)}, path, 'std')


def test_gate_maps_beside_their_image(tmp_path):
    picture = np.zeros((2, 32, 48, 3), np.uint8)
    picture[..., 0] = 255
    ramp = np.linspace(0, 1, 6, dtype=np.float32).reshape(1, 1, 6).repeat(4, 1).repeat(2, 0)
    save_gate_maps(picture, [GateMap(0, 0, ramp), GateMap(2, 1, ramp[..., ::-1].copy())], tmp_path / 'maps.png')
    blue, green, red = drawn(tmp_path / 'maps.png').astype(int).transpose(2, 0, 1)
    share = np.flatnonzero(((red > 250) & (green < 5) & (blue < 5)).any(axis=0)) / red.shape[1]
    assert share.size and share.max() < 0.36, 'the image stands in the first of three columns'
    yellow = np.flatnonzero(((red > 200) & (green > 200) & (blue < 100)).any(axis=0)) / red.shape[1]
    assert yellow.min() > 0.4, 'large values are yellow: at the right end of the first ramp and the left of the second'


@pytest.mark.parametrize('scale', ['log', 'gamma'])
@pytest.mark.parametrize('count', [1, 5])
def test_receptive_fields_side_by_side(scale, count, tmp_path):
    field = np.outer(np.hanning(33), np.hanning(47)) + 1e-6
    save_receptive_fields({f'model {i}': field for i in range(count)}, tmp_path / 'erf.png', scale=scale)
    drawn(tmp_path / 'erf.png')
    with pytest.raises(ValueError, match='linear'):
        save_receptive_fields({'a': field}, tmp_path / 'no.png', scale='linear')


def test_no_two_families_look_alike():
    styles = [_style(number) for number in range(30)]
    assert len(set(styles)) == len(styles)
