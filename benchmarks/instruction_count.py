"""Count the instructions that a GPU issues and the bytes it moves through L1 for each element, without a GPU.

A kernel that reads and writes few bytes for an element must also issue few instructions for it and load little again
from L1, or the issue slots or L1 (128 lanes and 128 bytes a cycle) decide its speed and not the memory. This bounds
what a kernel can reach of a GPU's copy bandwidth; it says nothing of latencies, so a measurement can only be lower.

    python -m benchmarks.instruction_count                       # bf16 on sm_90, heads of 32 channels
    python -m benchmarks.instruction_count --capability 80 --mode fp16 --sms 108 --ghz 1.41 --tb-per-s 1.7
    python -m benchmarks.instruction_count --lines output        # one kernel, by line of its source
    python -m benchmarks.instruction_count --out benchmarks/results/instruction_count.json --docs docs/attention_op.md

The defaults for clock, multiprocessors and copy bandwidth are an H200's: 132, 1.755 GHz under load, 4.3 TB/s.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.nvidia import compiler as nvidia

from benchmarks import compile_matrix as matrix
from benchmarks import kernel_launches, measure
from mila_mm.ops.triton import configs

TOKENS = 64000
"""Of the image whose splits are counted: stage 1 at 800 x 1280."""
RUN = 16
"""Rows of a run of the stencils, see `mila_mm.ops.triton.configs.rows_per_run`."""
# Passes over a (B, N, C) tensor, as the docstrings of mila_mm.ops.triton and its stencil_kernels count them. `norm`'s
# residual stream is counted in the dtype of the activations.
PASSES = {
    'state': 2,
    'output': 4,
    'gate_backward': 6,
    'query_backward': 3,
    'key_value_backward': 5,
    'lepe_backward': 2,
    'cpe_norm': 3,
    'norm_backward': 4,
    'dwc_silu': 2,
    'silu_backward': 3,
    'stencil_backward': 3,
}
INSTRUCTION = re.compile(r'^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);')
LABEL = re.compile(r'^(\.L\w+):')
SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')


@dataclass(frozen=True)
class Line:
    """An instruction with its source, ('file', line), and how often a thread issues it."""

    opcode: str
    source: tuple[str, int]
    times: int
    bytes: int


def disassemble(item: kernel_launches.Launch, capability: int) -> str:
    """The machine code of a launch, with the lines of its source."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(matrix.compile_launch(item, capability).asm['cubin'])
        file.flush()
        tool = Path(nvidia.__file__).parent / 'bin' / 'nvdisasm'
        command = [str(tool), '-c', '--print-line-info-inline', file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def through_l1(opcode: str) -> int:
    """Bytes that an instruction moves between a thread and L1 or shared memory, which are one."""
    name, *rest = opcode.split('.')
    if name not in ('LDG', 'STG', 'LDS', 'STS', 'LDGSTS', 'LD', 'ST', 'LDSM', 'STSM'):
        return 0
    if name in ('LDSM', 'STSM'):  # matrices of 8 x 8 numbers of 16 bits, a register a thread each
        return 4 * {'2': 2, '4': 4}.get(rest[-1], 1)
    sizes = {'128': 16, '64': 8, 'U16': 2, 'S16': 2, 'U8': 1, 'S8': 1}
    return next((sizes[suffix] for suffix in rest if suffix in sizes), 4)


def issued(text: str, trips: int) -> list[Line]:
    """Instructions up to the end of the kernel, those between a label and a branch back to it ``trips`` times."""
    found: list[tuple[bool, str, str, tuple[str, int]]] = []
    labels: dict[str, int] = {}
    source, inner = ('', 0), False
    for line in text.splitlines():
        if match := SOURCE.search(line):
            if not inner:  # of the chain of inlined calls the innermost comes first
                source, inner = (Path(match[1]).name, int(match[2])), True
        elif match := LABEL.match(line.strip()):
            labels[match[1]] = len(found)
        elif match := INSTRUCTION.match(line):
            found.append((bool(match[1]), match[2], match[3], source))
            inner = False
    times = [1] * len(found)
    for index, (_, opcode, operands, _) in enumerate(found):
        target = re.search(r'\.L\w+', operands)
        if opcode.startswith('BRA') and target and labels.get(target[0], index) < index - 1:
            for inside in range(labels[target[0]], index + 1):
                times[inside] *= trips
    end = next(i for i, (guarded, opcode, *_) in enumerate(found) if opcode == 'EXIT' and not guarded)
    return [
        Line(opcode.split('.')[0], source, count, through_l1(opcode))
        for (_, opcode, _, source), count in zip(found[: end + 1], times, strict=False)
        if opcode != 'NOP'
    ]


def work(item: kernel_launches.Launch) -> tuple[int, float]:
    """How often the loop of a kernel runs, and the elements of one tensor that a thread then has taken care of."""
    constants = dict(item.constants)
    name = item.kernel.removesuffix('_kernel')
    if name in ('state', 'query_backward'):
        trips = configs.tokens_per_split(TOKENS) // constants['BLOCK']
    else:
        trips = {
            'norm_backward': 8,
        }.get(name, 1)
    if 'GROUPS' in constants:  # a strip, whose run reads two rows more than it has
        return (RUN + 2) // 2, RUN * 2 * constants['GROUPS'] * constants['CHANNELS'] / (
            32 * dict(item.options)['num_warps']
        )
    tokens = constants['BLOCK'] if 'BLOCK' in constants else constants['ROWS'] * constants['COLUMNS']
    channels = constants.get('WIDTH') or constants['CHANNELS']
    return trips, tokens * trips * channels / (32 * dict(item.options)['num_warps'])


def by_line(lines: list[Line], elements: float) -> str:
    """What each line of the source costs, the dearest first."""
    total: collections.Counter[tuple[str, int]] = collections.Counter()
    opcodes: dict[tuple[str, int], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in lines:
        total[line.source] += line.times
        opcodes[line.source][line.opcode] += line.times
    return '\n'.join(
        f'{count / elements:7.2f}  {name}:{number:<4} '
        + ' '.join(f'{code} {n}' for code, n in opcodes[name, number].most_common(6))
        for (name, number), count in total.most_common(40)
    )


def into_docs(rows: dict[str, dict[str, float]], page: Path) -> None:
    """Write the rows as a table between the page's marks."""
    table = '\n'.join(
        [
            '| kernel | instructions | L1 bytes | bytes | bound |',
            '| --- | --- | --- | --- | --- |',
            *(
                f'| `{name}` | {row["instructions"]:.0f} | {row["l1_bytes"]:.0f} | {row["bytes"]} | '
                f'{row["bound"]:.0%} |'
                for name, row in rows.items()
            ),
        ]
    )
    begin, end = '<!-- instructions -->', '<!-- /instructions -->'
    text = page.read_text(encoding='utf-8')
    before, rest = text.split(begin)
    page.write_text(f'{before}{begin}\n{table}\n{end}{rest.split(end)[1]}', encoding='utf-8')


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--mode', choices=[mode for mode, *_ in kernel_launches.MODES], default='bf16')
    parser.add_argument('--capability', type=int, choices=matrix.CAPABILITIES, default=90)
    parser.add_argument('--head-width', type=int, choices=configs.HEAD_WIDTHS, default=32)
    parser.add_argument('--channels', type=int, default=64, help='of the stencils')
    parser.add_argument('--sms', type=int, default=132, help='multiprocessors, each issuing to 4 x 32 lanes a cycle')
    parser.add_argument('--ghz', type=float, default=1.755, help='clock under load')
    parser.add_argument('--tb-per-s', type=float, default=4.3, help='measured copy bandwidth, reads and writes')
    parser.add_argument('--lines', metavar='KERNEL', help='one kernel by lines of its source')
    parser.add_argument('--out', type=Path, help='JSON file to write')
    parser.add_argument('--docs', type=Path, help='page to write the table into, between its marks')
    return parser.parse_args()


def main() -> None:
    """Print the table; write the JSON and the page."""
    args = arguments()
    dtype, dots = next((dtype, dots) for mode, dtype, dots in kernel_launches.MODES if mode == args.mode)
    items = kernel_launches.record(args.mode, dtype, dots, args.head_width, 2, True, True, capability=args.capability)
    items += kernel_launches.record_stencils(args.mode, dtype, args.channels, capability=args.capability)
    lanes = args.sms * 128 * args.ghz * 1e9
    rows = {}
    if args.lines is None:
        print(
            f'{"kernel":20} instructions  L1 bytes  B     bound    (an element of one tensor; bound in copy bandwidth)'
        )
    for item in items:
        name = item.kernel.removesuffix('_kernel')
        name = 'silu_backward' if dict(item.constants).get('BACKWARD') else name
        if name not in PASSES or name in rows or args.lines not in (None, name):
            continue
        trips, elements = work(item)
        lines = issued(disassemble(item, args.capability), trips)
        if args.lines is not None:
            print(by_line(lines, elements))
            return
        count = sum(line.times for line in lines) / elements
        size = PASSES[name] * dtype.itemsize
        moved = sum(line.times * line.bytes for line in lines) / elements
        bound = min(1.0, lanes * size / (args.tb_per_s * 1e12) / max(count, moved))  # 128 lanes, 128 bytes a cycle
        rows[name] = {
            'instructions': round(count, 1),
            'l1_bytes': round(moved, 1),
            'bytes': size,
            'bound': round(bound, 3),
        }
        print(f'{name:20} {count:12.1f}  {moved:8.1f}  {size:<5} {bound:5.0%}')
    if args.out is not None:
        document = {
            'triton': triton.__version__,
            'commit': measure.commit(),
            **{key: value for key, value in vars(args).items() if key not in ('out', 'docs', 'lines')},
            'kernels': rows,
        }
        args.out.write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')
    if args.docs is not None:
        into_docs(rows, args.docs)


if __name__ == '__main__':
    main()
