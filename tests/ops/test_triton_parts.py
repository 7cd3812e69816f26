"""Parts of the Triton kernels and of their dispatch, and of the way in which tests reach Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip('triton')
tl = pytest.importorskip('triton.language')

from mila_mm.ops.triton.common import run_positions  # noqa: E402

pytestmark = pytest.mark.usefixtures('poisoned_memory')
interpreted = pytest.mark.interpreted  # see conftest.py
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


@triton.jit
def positions_kernel(row_ptr, column_ptr, first, width, BLOCK: tl.constexpr):
    """Rows and columns of BLOCK tokens from ``first`` on."""
    local = tl.arange(0, BLOCK)
    row, column = run_positions(first, local, width)
    tl.store(row_ptr + local, row)
    tl.store(column_ptr + local, column)


@interpreted
def test_positions_in_a_run() -> None:
    local = torch.arange(1024)
    for width in [1, 2, 3, 7, 333, 1000, 1023, 1024, 1025, 40961, 65521, 65535]:
        for first in [0, 1, width - 1, width, 12345 * width - 512, 12345 * width - 1]:
            row, column = torch.empty(2, 1024, dtype=torch.int32)
            positions_kernel[(1,)](row, column, max(first, 0), width, BLOCK=1024)
            token = max(first, 0) + local
            assert torch.equal(row.long(), token // width) and torch.equal(column.long(), token % width), (first, width)


@interpreted
def test_predicate_names_what_it_expected() -> None:
    from mila_mm.ops.triton.capability import why_not

    x = torch.zeros(1, 4, 64)
    assert why_not(torch.zeros(1, 4, 128), x, 2) is None
    assert why_not(torch.zeros(1, 4, 128), x, 8) == 'expected heads of 16, 24, 32, 48, 64 channels, got 8'
    assert 'got torch.float64' in (why_not(torch.zeros(1, 4, 128).double(), x.double(), 2) or '')
    for batch, size in [(1, (65536, 1)), (1, (1, 65536)), (65536, (2, 2))]:
        x = torch.zeros(1, 1, 64).expand(batch, size[0] * size[1], 64)
        reason = why_not(torch.zeros(1, 1, 128).expand(*x.shape[:2], 128), x, 2, size)
        assert reason == 'expected at most 65535 images and 65535 tokens on a side, got more'
    v = torch.zeros(1).expand(1, 60000, 2048)
    assert 'numbers in ten rows' in (why_not(torch.zeros(1).expand(1, 60000, 4096), v, 64, (1, 60000)) or '')


@pytest.mark.skipif(INTERPRETED, reason='the interpreter takes tensors of any device')
def test_predicate_without_gpu_or_interpreter() -> None:
    from mila_mm.ops.triton.capability import why_not

    assert why_not(torch.zeros(1, 4, 128), torch.zeros(1, 4, 64), 2) == 'expected CUDA tensors, got cpu'


@interpreted
def test_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()


@pytest.mark.skipif(INTERPRETED, reason='speaks of the process that starts the interpreting one')
def test_a_failure_there_is_a_failure_here(request: pytest.FixtureRequest) -> None:
    conftest = next(
        plugin
        for plugin in request.config.pluginmanager.get_plugins()
        if getattr(plugin, '__file__', None) == str(Path(__file__).with_name('conftest.py'))
    )
    outcomes: dict[tuple[str, str], str | None] = {('test_some', 'test_other'): None}
    session = SimpleNamespace(stash={conftest._outcomes: outcomes})
    item = SimpleNamespace(session=session, path=Path('test_some.py'), name='test_thing', get_closest_marker=bool)
    with pytest.raises(pytest.fail.Exception, match='did not run test_thing'):
        conftest.pytest_pyfunc_call(item)
    outcomes['test_some', 'test_thing'] = 'the assertion'
    with pytest.raises(pytest.fail.Exception, match='the assertion'):
        conftest.pytest_pyfunc_call(item)
    outcomes['test_some', 'test_thing'] = None
    assert conftest.pytest_pyfunc_call(item)
    item.get_closest_marker = lambda name: None
    assert conftest.pytest_pyfunc_call(item) is None, 'a test without the mark runs as it is'
