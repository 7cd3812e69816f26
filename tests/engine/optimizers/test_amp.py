"""Mixed precision: which dtype, what stays in fp32, and that nothing overflows."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mila_mm import MILA
from mila_mm.engine.optimizers import amp as precision
from mila_mm.engine.optimizers.amp import AmpOptimWrapper, check_precision, configured_amp, default_dtype, use_amp
from mila_mm.errors import UserError
from mila_mm.ops import mila_attention, mila_attention_reference

EPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = [torch.bfloat16, torch.float16]


def wrapper(dtype=None, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    return model, AmpOptimWrapper(dtype, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), **options)


@pytest.fixture
def no_gpu(monkeypatch):
    for name in ('cuda', 'npu', 'mlu', 'musa'):
        monkeypatch.setattr(precision, f'is_{name}_available', lambda: False)


@pytest.mark.parametrize('has_bf16', [True, False])
def test_default_is_bf16_where_the_gpu_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has_bf16)
    assert default_dtype('cuda') == (torch.bfloat16 if has_bf16 else torch.float16)
    assert default_dtype('cpu') == torch.bfloat16


@pytest.mark.parametrize(('name', 'dtype'), [('bf16', torch.bfloat16), ('float16', torch.float16), (None, None)])
def test_use_amp_sets_the_wrapper(name, dtype):
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))))
    use_amp(cfg, name)
    assert cfg.optim_wrapper.type == 'mila_mm.AmpOptimWrapper'
    assert cfg.optim_wrapper.get('dtype') == name
    use_amp(cfg, name)  # a dumped config may be trained again


@pytest.mark.parametrize(
    ('amp', 'expected'), [(True, 'auto'), ('auto', 'auto'), ('fp16', 'fp16'), (None, None), (False, None)]
)
def test_amp_of_a_config(amp, expected):
    assert configured_amp(Config(dict(amp=amp))) == expected


def test_wrong_names_are_refused():
    for make in (
        lambda: configured_amp(Config(dict(amp='fp8'))),
        lambda: wrapper('fp32'),
        lambda: wrapper('fp16', loss_scale='static'),
        lambda: wrapper('fp16', loss_scale=-1.0),
    ):
        with pytest.raises(UserError, match='expected'):
            make()


def test_fp16_on_a_cpu_is_refused(no_gpu):
    cfg = Config(dict(optim_wrapper=dict(type='mila_mm.AmpOptimWrapper', dtype='fp16')))
    with pytest.raises(UserError, match=r'--amp-dtype fp16 needs a GPU.*\n.*bf16'):
        check_precision(cfg)
    check_precision(Config(dict(optim_wrapper=dict(type='mila_mm.AmpOptimWrapper', dtype='bf16'))))
    with pytest.raises(UserError, match='needs a GPU'):
        check_precision(Config(dict(optim_wrapper=dict(type='AmpOptimWrapper'))))


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    monkeypatch.setattr(precision, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'an old GPU')
    with pytest.raises(UserError, match='an old GPU has no bf16'):
        check_precision(Config(dict(optim_wrapper=dict(type='mila_mm.AmpOptimWrapper', dtype='bf16'))))


def test_bf16_is_not_scaled_and_fp16_is():
    assert not wrapper('bf16')[1].loss_scaler.is_enabled()
    assert wrapper('fp16')[1].loss_scaler.is_enabled()
    assert wrapper('fp16', loss_scale=128.0)[1].loss_scaler.get_scale() == 128


@pytest.mark.skipif(torch.cuda.is_available(), reason='for the wrapper of a CPU')
def test_an_overflow_skips_the_step_and_halves_the_scale():
    model, amp = wrapper('fp16')
    before, scale = model.weight.detach().clone(), amp.loss_scaler.get_scale()
    with amp.optim_context(model):
        loss = model(torch.ones(2, 4)).mean()
    amp.update_params(loss * float('inf'))
    assert torch.equal(model.weight, before) and amp.loss_scaler.get_scale() == scale / 2
    with amp.optim_context(model):
        loss = model(torch.ones(2, 4)).mean()
    amp.update_params(loss)
    assert not torch.equal(model.weight, before) and model.weight.dtype == torch.float32


@pytest.mark.parametrize(('first', 'second'), [('fp16', 'fp16'), ('fp16', 'bf16'), ('bf16', 'fp16')])
@pytest.mark.skipif(torch.cuda.is_available(), reason='for the wrapper of a CPU')
def test_state_goes_from_one_precision_to_another(first, second):
    model, amp = wrapper(first, loss_scale=dict(init_scale=1024.0))
    with amp.optim_context(model):
        loss = model(torch.ones(2, 4)).mean()
    amp.update_params(loss)
    other = wrapper(second)[1]
    other.load_state_dict(amp.state_dict())
    assert other.optimizer.state_dict()['state'].keys() == amp.optimizer.state_dict()['state'].keys()
    if first == second:
        assert other.loss_scaler.get_scale() == 1024


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('inside', [True, False], ids=['backward inside autocast', 'backward after it'])
def test_attention_computes_in_fp32_under_autocast(dtype, inside):
    """Its error is that of rounding inputs and result: sums over 6000 tokens in 16 bits would be far off."""
    torch.manual_seed(0)
    height, width, channels = 10, 600, 32  # column 599 turns by 599 radians, which bf16 knows to 4 radians
    qk, v, gate = (torch.randn(1, height * width, c).to(dtype) for c in (2 * channels, channels, channels))
    weight, bias = torch.randn(channels, 1, 3, 3) / 3, torch.randn(channels)
    exact = [t.double().requires_grad_() for t in (qk, v, weight, bias, gate)]
    expected = mila_attention_reference(*exact[:4], (height, width), 2, exact[4])
    grad = torch.randn_like(expected).to(dtype)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    inputs = [t.clone().requires_grad_() for t in (qk, v, weight, bias, gate)]
    with torch.autocast('cpu', dtype):
        y = mila_attention(*inputs[:4], (height, width), 2, inputs[4])
        got = torch.autograd.grad(y, inputs, grad) if inside else None
    got = got if inside else torch.autograd.grad(y, inputs, grad)
    assert y.dtype == dtype
    for a, b in zip((y, *got), (expected, *wanted), strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error <= EPS[a.dtype] if a.dtype in EPS else error <= 1e-4, (tuple(a.shape), error)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_norm_statistics_are_fp32_under_autocast(dtype):
    """At a mean of 300 and a deviation of 1, sums of squares in 16 bits leave nothing of the variance."""
    torch.manual_seed(0)
    x = (300 + torch.randn(2, 64, 256)).to(dtype)
    norm = nn.LayerNorm(256)
    with torch.autocast('cpu', dtype):
        y = norm(x)
    expected = nn.functional.layer_norm(x.double(), (256,))
    assert (y.double() - expected).abs().max() <= 4 * EPS[dtype] * expected.abs().max()
    batch_norm = nn.BatchNorm2d(8)
    maps = (300 + torch.randn(2, 8, 32, 32)).to(dtype)
    with torch.autocast('cpu', dtype):
        y = batch_norm(maps)
    expected = nn.functional.batch_norm(maps.double(), None, None, training=True)
    assert (y.double() - expected).abs().max() <= 4 * EPS[dtype] * expected.abs().max()
    assert batch_norm.running_var.dtype == torch.float32
    torch.testing.assert_close(
        batch_norm.running_var.double(), 0.9 + 0.1 * maps.double().var((0, 2, 3)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_gradients_outside_of_autocast_reach_every_parameter(dtype):
    """As mmengine trains: the forward under autocast, the backward after it."""
    torch.manual_seed(0)
    model = MILA(dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2)), out_indices=(0, 1)).train()
    image = torch.randn(2, 3, 75, 101)
    with torch.autocast('cpu', dtype):
        maps = model(image)
    sum(m.float().square().mean() for m in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(('dtype', 'steps'), [(torch.bfloat16, 30), (torch.float16, 12)], ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason='for the autocast of a CPU')
def test_training_stays_finite(dtype, steps, tmp_path):
    """The short form of benchmarks/precision_curves.py: nano learns to tell bright from dark quarters."""
    torch.manual_seed(0)
    model = nn.Sequential(MILA('nano', out_indices=(3,)), nn.Identity())
    head = nn.Linear(256, 4)
    parameters = [*model.parameters(), *head.parameters()]
    amp = AmpOptimWrapper(dtype, optimizer=torch.optim.AdamW(parameters, lr=2e-3), clip_grad=dict(max_norm=5.0))
    losses = []
    for _ in range(steps):
        labels = torch.randint(0, 4, (8,))
        images = torch.randn(8, 3, 64, 64) * 0.3
        for image, label in zip(images, labels, strict=True):
            image[:, 32 * (label // 2) : 32 * (label // 2) + 32, 32 * (label % 2) : 32 * (label % 2) + 32] += 2
        with amp.optim_context(model):
            loss = nn.functional.cross_entropy(head(model(images)[0].mean((2, 3))), labels)
        amp.update_params(loss)
        losses.append(loss.item())
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and all(p.isfinite().all() for p in parameters)
    if steps >= 30:
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), 'it learns'
