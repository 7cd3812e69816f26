import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)

SHAPES = torch.tensor([[5, 7], [3, 4], [1, 1]])
STARTS = torch.tensor([0, 35, 47])


def operands(batch: int = 2, queries: int = 9, dtype: torch.dtype = torch.double) -> tuple[torch.Tensor, ...]:
    value = torch.randn(batch, 48, 3, 4, dtype=dtype)
    location = torch.rand(batch, queries, 3, 3, 2, 2, dtype=dtype) * 1.6 - 0.3  # some lie outside
    weight = torch.rand(batch, queries, 3, 3, 2, dtype=dtype)
    return value, location, weight


def attend(value: torch.Tensor, location: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return MultiScaleDeformableAttnFunction.apply(value, SHAPES, STARTS, location, weight, 64)


def test_equals_grid_sample() -> None:
    value, location, weight = operands()
    expected = multi_scale_deformable_attn_pytorch(value, SHAPES, location, weight)
    torch.testing.assert_close(attend(value, location, weight), expected)


def test_gradients_equal_those_of_grid_sample() -> None:
    given = [t.requires_grad_() for t in operands()]
    value, location, weight = given
    out = attend(*given)
    direction = torch.randn_like(out)
    reference = multi_scale_deformable_attn_pytorch(value, SHAPES, location, weight)
    expected = torch.autograd.grad(reference, given, direction)
    for got, want in zip(torch.autograd.grad(out, given, direction), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck() -> None:
    given = [t.requires_grad_() for t in operands(batch=1, queries=3)]
    assert torch.autograd.gradcheck(attend, given, fast_mode=True)


def test_runs_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.compat.mmcv_ext import attention

    given = [t.requires_grad_() for t in operands()]
    whole = attend(*given)
    grads = torch.autograd.grad(whole.square().sum(), given)
    monkeypatch.setattr(attention, 'CPU_SAMPLES_AT_ONCE', 300)  # two queries at a time
    pieces = attend(*given)
    torch.testing.assert_close(pieces, whole)
    for got, want in zip(torch.autograd.grad(pieces.square().sum(), given), grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    value, location, weight = (t.to(dtype) for t in operands(dtype=torch.float32))
    value.requires_grad_()
    out = attend(value, location, weight)
    exact = value.detach().double().requires_grad_()
    reference = multi_scale_deformable_attn_pytorch(exact, SHAPES, location.double(), weight.double())
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), reference, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    reference.sum().backward()
    torch.testing.assert_close(value.grad.double(), exact.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('place', [float('nan'), float('inf')])
def test_a_place_that_is_not_finite_spoils_its_query_only(place: float) -> None:
    value, location, weight = operands()
    expected = attend(value, location, weight)
    location[0, 4, 1, 2, 0, 1] = place
    out = attend(value.requires_grad_(), location, weight)
    torch.testing.assert_close(out[1], expected[1])
    torch.testing.assert_close(out[0, :4], expected[0, :4])
    assert out[0, 4].isnan().any()
    out.nansum().backward()


def test_no_queries() -> None:
    given = [t.requires_grad_() for t in operands(queries=0)]
    out = attend(*given)
    assert out.shape == (2, 0, 12)
    assert torch.autograd.grad(out.sum(), given[0])[0].abs().sum() == 0


def test_module_trains() -> None:
    layer = MultiScaleDeformableAttention(embed_dims=24, num_heads=3, num_levels=3, num_points=2, batch_first=True)
    query = torch.randn(2, 9, 24, requires_grad=True)
    out = layer(
        query,
        value=torch.randn(2, 48, 24),
        reference_points=torch.rand(2, 9, 3, 2),
        spatial_shapes=SHAPES,
        level_start_index=STARTS,
    )
    out.square().sum().backward()
    assert out.shape == (2, 9, 24) and query.grad.abs().sum() > 0
