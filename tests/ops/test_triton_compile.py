"""The shipped launches compile for GPUs that are not there: no spilled registers, 128-bit loads.

In a process of its own, since one process either interprets or compiles Triton's kernels. The default selection is
heads of 32 channels and stencils of two widths; ``benchmarks/compile_matrix.py`` without ``--quick`` compiles all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('triton')

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    f'{name}_kernel'
    for name in (
        'state',
        'reduce',
        'output',
        'gate_backward',
        'query_backward',
        'key_value_backward',
        'lepe_backward',
        'lepe_reduce',
    )
}
STENCILS = {
    f'{name}_kernel'
    for name in (
        'cpe_norm',
        'norm_backward',
        'layer_norm',
        'dwc_silu',
        'stencil_backward',
        'relu_dwc_relu',
        'relu_dwc_relu_backward',
        'column_parts',
        'column_reduce',
        'block_reduce',
        'gelu_backward',
        'batch_statistics',
        'batch_moments',
        'batch_norm',
        'batch_norm_sums',
        'batch_norm_backward',
    )
}

OF_16_BITS = {'mlp_kernel', 'hidden_backward_kernel', 'weight_gradients_kernel'}


@pytest.fixture(scope='module')
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What ptxas says of every binary."""
    out = tmp_path_factory.mktemp('compile') / 'matrix.json'
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    command = [sys.executable, '-m', 'benchmarks.compile_matrix', '--quick', '--out', str(out)]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    sys.stdout.write(run.stdout)  # the table of registers, shown with -rP or where a test fails
    if not out.exists():
        pytest.fail(f'compile_matrix wrote no report:\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}')
    return json.loads(out.read_text(encoding='utf-8'))['reports']


def test_no_binary_depends_on_the_size(tmp_path: Path) -> None:
    """Not even where the channels do not divide by 16, and a map's elements do or do not."""
    script = tmp_path / 'sizes.py'
    script.write_text("""
import torch
from benchmarks import kernel_launches as matrix
for channels, heads in ((24, 1), (72, 3), (48, 2), (64, 2)):
    binaries = [[*matrix.record('bf16', torch.bfloat16, 'low', channels // heads, heads, True, True, size),
                 *matrix.record_stencils('bf16', torch.bfloat16, channels, size)]
                for size in ((17, 19), (16, 18), (32, 32), (1, 333))]
    assert len(binaries[0]) >= 13
    for other in binaries[1:]:
        for one, another in zip(binaries[0], other, strict=True):
            assert one == another, (channels, one, another)
""")
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'} | {'PYTHONPATH': str(ROOT)}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_operands_of_tf32_products_are_rounded() -> None:
    """Triton hands fp32 over as it is, and the matrix units cut off what they do not take: a bias of 3e-4."""
    script = """
from benchmarks import compile_matrix, kernel_launches
for mode, dtype, dots in kernel_launches.MODES:
    if dots == 'tf32':
        for capability in (80, 90):
            launches = kernel_launches.record(mode, dtype, dots, 32, 2, False, False, capability=capability)
            for item in (item for item in launches if item.kernel in ('state_kernel', 'output_kernel')):
                assert 'cvt.rna.tf32' in compile_matrix.compile_launch(item, capability).asm['ptx'], item
"""
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    run = subprocess.run([sys.executable, '-c', script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize('capability', [80, 90, 100])
@pytest.mark.parametrize('mode', ['fp32', 'fp32-tf32', 'fp16', 'bf16'])
def test_no_spills_and_wide_loads(reports: list[dict[str, Any]], mode: str, capability: int) -> None:
    mine = [report for report in reports if report['mode'] == mode and report['capability'] == capability]
    kernels = KERNELS if mode == 'fp32-tf32' else KERNELS | STENCILS
    assert {report['kernel'] for report in mine} == (kernels | OF_16_BITS if mode in ('fp16', 'bf16') else kernels)
    bad = [report for report in mine if report['error'] or report['spill_bytes'] or report['narrow']]
    assert not bad, '\n'.join(map(str, bad))


def test_issue_slots_allow_most_of_the_bandwidth(tmp_path: Path) -> None:
    """In bf16 on an H200: a kernel that issued more could not be fast, whatever else was done."""
    out = tmp_path / 'count.json'
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    command = [sys.executable, '-m', 'benchmarks.instruction_count', '--out', str(out)]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    kernels = json.loads(out.read_text(encoding='utf-8'))['kernels']
    attention = {name for name in (kernel.removesuffix('_kernel') for kernel in KERNELS) if 'reduce' not in name}
    assert attention <= set(kernels)
    assert all(kernels[name]['bound'] >= 0.7 for name in attention), kernels
    # Strips load a row once: three bf16 numbers read and one written are 8 bytes, a stencil by tiles takes 34 and more.
    strips = {'lepe_backward', 'cpe_norm', 'stencil_backward', 'dwc_silu'}
    assert all(kernels[name]['l1_bytes'] <= 20 and kernels[name]['bound'] >= 0.7 for name in strips), kernels
