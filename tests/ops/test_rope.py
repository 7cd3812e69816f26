"""RoPE's tables: what is cached is what the arguments ask for, whatever was asked for before."""

import itertools

import pytest
import torch

from mila_mm.ops import clear_rope_cache, mila_attention, mila_attention_reference, rope_tables
from mila_mm.ops.rope import build_rope_grid, rope_grid

CPU = torch.device('cpu')


def angles(length: int, channels: int, base: float) -> torch.Tensor:
    """Position times frequency, (length, channels // 4) in fp64, by the formula (arXiv 2104.09864, section 3.2.2)."""
    k = channels // 4
    theta = torch.tensor([base ** (-i / k) for i in range(k)], dtype=torch.float64)
    return torch.arange(length, dtype=torch.float64)[:, None] * theta


@pytest.fixture(autouse=True)
def forgetful():
    clear_rope_cache()
    yield
    clear_rope_cache()


def test_tables_depend_on_base_width_and_length() -> None:
    asked = list(itertools.product((7, 70, 5), (32, 64), (10000.0, 100.0, 10000, 7.5)))
    for length, channels, base in asked:
        cos, sin = rope_tables(length, channels, base, CPU)
        expected = angles(length, channels, base)
        assert cos.shape[0] >= length
        torch.testing.assert_close(cos[:length].double(), expected.cos(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sin[:length].double(), expected.sin(), rtol=0, atol=1e-5)


def test_grids_depend_on_every_argument() -> None:
    plain = dict(height=3, width=4, channels=32, base=10000.0, device=CPU, dtype=torch.float32, inverse=False)
    changes = [
        {},
        dict(height=4, width=3),
        dict(channels=64),
        dict(base=100.0),
        dict(dtype=torch.float64),
        dict(inverse=True),
    ]
    for change in [*changes, *reversed(changes)]:
        asked = plain | change
        inverse = asked.pop('inverse')
        fresh = build_rope_grid(**asked)
        expected = fresh * fresh.new_tensor([1, -1]) if inverse else fresh
        got = rope_grid(**asked, inverse=inverse)
        assert got.dtype == asked['dtype'] and torch.equal(got, expected)


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_attention_with_another_base_is_another_attention(backend: str) -> None:
    torch.manual_seed(0)
    qk, v = torch.randn(1, 12, 64), torch.randn(1, 12, 32)
    results = []
    for base in (10000.0, 50.0, 10000.0):
        got = mila_attention(qk, v, None, None, (3, 4), 1, rope_base=base, backend=backend)
        wide = mila_attention_reference(qk.double(), v.double(), None, None, (3, 4), 1, rope_base=base)
        torch.testing.assert_close(got.double(), wide, rtol=1e-4, atol=1e-5)
        results.append(got)
    assert torch.equal(results[0], results[2]) and not torch.allclose(results[0], results[1], atol=1e-3)
