"""Compile the kernels of attention and block for GPUs that need not be there, and report registers and spills.

What is compiled is exactly what a GPU would be given (:mod:`benchmarks.kernel_launches`). ptxas comes with Triton.

    python -m benchmarks.compile_matrix --out benchmarks/results/compile_matrix.json           # everything
    python -m benchmarks.compile_matrix --quick                                                 # heads of 32 channels

Exits with 1 where a kernel does not compile, spills registers or, with heads of 32 channels, does not load 128 bits
at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if os.environ.get('TRITON_INTERPRET', '0') not in {'', '0'}:
    sys.exit('compile_matrix: expected TRITON_INTERPRET unset, got it set: the interpreter compiles nothing')

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from benchmarks import measure
from benchmarks.kernel_launches import Launch, every_launch
from mila_mm.ops.triton import configs

CAPABILITIES = (80, 90, 100)
STRIPS = {
    f'{name}_kernel'
    for name in ('cpe_norm', 'dwc_silu', 'stencil_backward', 'lepe_backward', 'relu_dwc_relu', 'relu_dwc_relu_backward')
}
UNALIGNED = '72 channels'
"""Rows that begin at no multiple of 16 elements: their kernels are shipped, and load element by element."""


@dataclass(frozen=True)
class Report:
    """What ptxas made of a launch."""

    kernel: str
    case: str
    mode: str
    capability: int
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_loads: int
    loads: int
    error: str = ''

    @property
    def narrow(self) -> bool:
        """Whether too few of the load instructions move 128 bits, with heads of 32 channels and LePE.

        What may be narrower are vectors of a few numbers per program (the key mean, the bias) and, with the small
        steps that three TF32 terms leave registers for, the rotation tables. Kernels that walk down strips load each
        row once, in narrower pieces: what they take from L1 is counted in bytes by ``instruction_count``.
        """
        if self.kernel in STRIPS or self.case.startswith(UNALIGNED):
            return False
        if 'channels' in self.case:
            # With four elements a thread, activations of 16 bits move 64 bits at a time; what is wide are the weights.
            return self.wide_loads < 1 / 3 * self.loads
        least = 0.4 if self.mode == 'fp32' else 2 / 3
        return 'd32 even heads lepe' in self.case and self.wide_loads < least * self.loads


def tasks(quick: bool, head_widths: Sequence[int]) -> Iterator[tuple[Launch, int]]:
    """The distinct binaries of the matrix: all that is shipped, or heads of 32 channels with LePE."""
    seen = set()
    for capability in CAPABILITIES:
        for item in every_launch(quick, head_widths, capability):
            key = dataclasses.replace(item, case=''), capability
            if key not in seen:
                seen.add(key)
                yield item, capability


def compile_launch(item: Launch, capability: int) -> triton.compiler.CompiledKernel:
    """Compile one launch for one compute capability."""
    module = sys.modules[item.module]
    source = ASTSource(
        fn=getattr(module, item.kernel),
        signature=dict(item.signature),
        constexprs=dict(item.constants),
        attrs={(index,): [['tt.divisibility', 16]] for index in item.divisible},
    )
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(item.options))


def compile_one(task: tuple[Launch, int]) -> Report:
    """Compile one launch for one compute capability and read what it uses."""
    item, capability = task
    warps = dict(item.options)['num_warps']
    try:
        compiled = compile_launch(item, capability)
    except (RuntimeError, triton.CompilationError) as error:  # reported with the others, and makes the run fail
        return Report(item.kernel, item.case, item.mode, capability, warps, 0, 0, 0, 0, 0, str(error) or repr(error))
    tool = Path(nvidia.__file__).parent / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage = subprocess.run([str(tool), '-res-usage', file.name], check=True, capture_output=True, text=True).stdout

    def field(name: str) -> int:
        return int(re.search(rf'\b{name}:(\d+)', usage).group(1))

    ptx = compiled.asm['ptx']
    loads = re.findall(r'(?:ld\.global|cp\.async\.c[ag])[^;]*;', ptx)
    wide = [x for x in loads if re.search(r'\.v4\.b32|\.v2\.b64|\.v8\.b32|, 0x10|, 16', x)]
    return Report(
        item.kernel,
        item.case,
        item.mode,
        capability,
        warps,
        field('REG'),
        field('STACK') + field('LOCAL'),
        compiled.metadata.shared,
        len(wide),
        len(loads),
    )


def table(reports: list[Report]) -> str:
    """The reports as text, one line for a kernel and case, one column for a compute capability."""
    rows: dict[tuple[str, str, str], dict[int, Report]] = {}
    for report in reports:
        rows.setdefault((report.mode, report.kernel, report.case), {})[report.capability] = report
    lines = [f'{"mode":10} {"kernel":26} {"case":30} ' + ' '.join(f'{"sm_" + str(c):>12}' for c in CAPABILITIES)]
    for (mode, kernel, case), by_target in sorted(rows.items()):
        cells = []
        for capability in CAPABILITIES:
            report = by_target.get(capability)
            text = '-'
            if report is not None:
                spill = f'+{report.spill_bytes}B' if report.spill_bytes else ''
                text = 'FAILED' if report.error else f'{report.registers}{spill}'
            cells.append(f'{text:>12}')
        lines.append(f'{mode:10} {kernel.removesuffix("_kernel"):26} {case:30} ' + ' '.join(cells))
    return '\n'.join(lines)


def main() -> int:
    """Compile, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--quick',
        action='store_true',
        help='only heads of 32 channels, an even number, with LePE, and stencils of two widths',
    )
    parser.add_argument('--head-widths', type=int, nargs='+', default=configs.HEAD_WIDTHS)
    parser.add_argument('--only', default='', help='only kernels whose name contains this')
    parser.add_argument('--jobs', type=int, default=2, help='processes (default: %(default)s)')
    parser.add_argument('--out', type=Path, help='JSON file to write')
    args = parser.parse_args()

    wanted = [task for task in tasks(args.quick, args.head_widths) if args.only in task[0].kernel]
    if not wanted:
        parser.error(f'expected --only to be part of the name of a kernel, got {args.only!r}')
    with multiprocessing.get_context('spawn').Pool(args.jobs) as pool:
        reports = pool.map(compile_one, wanted, chunksize=4)
    print(table(reports))
    spilled = [report for report in reports if report.spill_bytes]
    narrow = [report for report in reports if report.narrow]
    for report in narrow:
        print(f'only {report.wide_loads} of {report.loads} loads of 128 bits: {report}')
    failed = [report for report in reports if report.error]
    print(
        f'{len(reports)} binaries, {len(failed)} that do not compile, {len(spilled)} with spills, '
        f'{len(narrow)} without 128-bit loads'
    )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        document = {
            'triton': triton.__version__,
            'torch': torch.__version__,
            'ptxas': nvidia.get_ptxas_version(90).strip().splitlines()[-1],
            'commit': measure.commit(),
            'reports': [{**asdict(report), 'narrow': report.narrow} for report in reports],
        }
        args.out.write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')
    return 1 if failed or spilled or narrow else 0


if __name__ == '__main__':
    sys.exit(main())
