"""Times the stand-in for mmcv._ext beside a compiled mmcv, where there is one, and beside mmcv's own plain PyTorch.

    python -m benchmarks.mmcv_ops [--device cpu] [--threads 1] [--out benchmarks/results/mmcv_ops_cpu.json]
    python -m benchmarks.mmcv_ops --docs --out benchmarks/results/mmcv_ops_cpu.json  # docs/mmcv_ops_speed.md

Every pair is timed in turns, so that a busy machine disturbs both alike; the ratio is the median of the
turns' ratios. Each op is checked before it is timed: results that differ end the run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import mila_mm  # noqa: F401 - supplies mmcv._ext where mmcv is not compiled
from benchmarks import measure
from benchmarks.backbone_cpu import machine as cpu_machine
from mila_mm.compat.mmcv_ext import is_stand_in
from mila_mm.compat.mmcv_ext.table import populate

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[[], Tensor]


def stand_in() -> ModuleType:
    """Make the stand-in module, whatever mmcv._ext is."""
    module = ModuleType('stand_in')
    populate(module)
    return module


def compiled() -> ModuleType | None:
    """Return mmcv's compiled ops, or None."""
    if is_stand_in():
        return None
    import mmcv._ext

    return mmcv._ext


def some_boxes(count: int, height: int, width: int, device: str) -> Tensor:
    """Boxes of COCO-like sizes: square roots of areas from 16 to 400 pixels."""
    centre = torch.rand(count, 2, device=device) * torch.tensor([width, height], device=device)
    side = 16 * 25 ** torch.rand(count, 2, device=device)
    return torch.cat((centre - side / 2, centre + side / 2), 1).clamp_(min=0)


def nms_case(ops: ModuleType, device: str) -> Run:
    """1000 boxes on an image of 800 x 1280."""
    boxes, scores = some_boxes(1000, 800, 1280, device), torch.rand(1000, device=device)
    return lambda: ops.nms(boxes, scores, iou_threshold=0.7, offset=0)


def softnms_case(ops: ModuleType, device: str) -> Run:
    """1000 boxes, linear; always on the CPU."""
    boxes, scores, dets = some_boxes(1000, 800, 1280, 'cpu'), torch.rand(1000), torch.zeros(1000, 5)
    options = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=1, offset=0)
    return lambda: ops.softnms(boxes, scores, dets, **options)


def roi_align_case(backward: bool) -> Callable[[ModuleType, str], Run]:
    """1000 boxes on one map of 256 x 200 x 320, 7 x 7 bins."""

    def make(ops: ModuleType, device: str) -> Run:
        maps = torch.randn(1, 256, 200, 320, device=device)
        rois = torch.cat((torch.zeros(1000, 1, device=device), some_boxes(1000, 800, 1280, device)), 1)
        none = torch.zeros(0, device=device)
        options = dict(aligned_height=7, aligned_width=7, spatial_scale=0.25, sampling_ratio=0, pool_mode=1)
        grad = torch.randn(1000, 256, 7, 7, device=device)

        def run() -> Tensor:
            if backward:
                out = torch.zeros_like(maps)
                ops.roi_align_backward(grad, rois, none, none, out, **options, aligned=True)
            else:
                out = torch.zeros(1000, 256, 7, 7, device=device)
                ops.roi_align_forward(maps, rois, out, none, none, **options, aligned=True)
            return out

        return run

    return make


def deform_conv_case(ops: ModuleType, device: str) -> Run:
    """A modulated 3 x 3 deformable convolution, 256 channels, 50 x 80."""
    maps, weight = torch.randn(1, 256, 50, 80, device=device), torch.randn(256, 256, 3, 3, device=device)
    offset, mask = torch.randn(1, 18, 50, 80, device=device), torch.rand(1, 9, 50, 80, device=device)
    bias, none = torch.zeros(256, device=device), torch.zeros(0, device=device)
    sizes = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, True)

    def run() -> Tensor:
        out = torch.zeros_like(maps)
        ops.modulated_deform_conv_forward(maps, weight, bias, none, offset, mask, out, none, *sizes)
        return out

    return run


def attention_operands(queries: int, device: str) -> tuple[Tensor, ...]:
    """Four levels of an image of 800 x 1280, from stride 8 on; 8 heads of 32 channels, 4 points."""
    shapes = torch.tensor([[100, 160], [50, 80], [25, 40], [13, 20]], device=device)
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
    value = torch.randn(1, int(shapes.prod(1).sum()), 8, 32, device=device, requires_grad=True)
    location = torch.rand(1, queries, 8, 4, 4, 2, device=device, requires_grad=True)
    weight = torch.rand(1, queries, 8, 4, 4, device=device, requires_grad=True)
    return value, shapes, starts, location, weight


def attention_cases(queries: int, backward: bool, ours: ModuleType, device: str) -> tuple[Run, Run]:
    """Deformable attention: the stand-in, and mmcv's plain PyTorch, which it uses on CPU compiled or not."""
    from mmcv.ops import multi_scale_deform_attn as attn

    value, shapes, starts, location, weight = attention_operands(queries, device)
    attn.ext_module = ours

    def finish(out: Tensor) -> Tensor:
        if not backward:
            return out.detach()
        return torch.autograd.grad(out.sum(), (value, location, weight))[0]

    def fused() -> Tensor:
        return finish(attn.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, location, weight, 64))

    def plain() -> Tensor:
        return finish(attn.multi_scale_deformable_attn_pytorch(value, shapes, location, weight))

    return fused, plain


def timed(run: Run, device: str) -> float:
    """Seconds of one run."""
    begin = time.perf_counter()
    run()
    if device == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(name: str, other: str, ours: Run, theirs: Run | None, args: argparse.Namespace) -> dict[str, object]:
    """Check that both agree, time them in turns and print a line."""
    row: dict[str, object] = {'op': name, 'beside': other if theirs else None}
    if theirs:
        torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-3)
    else:
        ours()
    turns = [(timed(ours, args.device), timed(theirs, args.device) if theirs else 0.0) for _ in range(args.turns)]
    row['ms'] = round(1e3 * statistics.median(t[0] for t in turns), 3)
    line = f'{name:28s} {row["ms"]:10.2f} ms'
    if theirs:
        row['beside_ms'] = round(1e3 * statistics.median(t[1] for t in turns), 3)
        row['ratio'] = round(statistics.median(a / b for a, b in turns), 3)
        line += f'   {other}: {row["beside_ms"]:10.2f} ms   ratio {row["ratio"]:.2f}'
    print(line, flush=True)
    return row


def mmcv_version() -> str:
    """Name, version and kind of the mmcv beside which was timed."""
    import mmcv

    return f'mmcv {mmcv.__version__}, {"not compiled" if is_stand_in() else "compiled"}'


def table(document: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine, versions = document['machine'], document['versions']
    lines = [
        f'{machine.get("gpu") or machine["cpu"]}, {document["threads"]} thread(s), torch {versions["torch"]}, '
        f'torchvision {versions["torchvision"]}, {versions["mmcv"]}, {machine["date"][:10]}.',
        '',
        '| op | here, ms | beside | its time, ms | ratio, median of turns |',
        '| --- ' * 5 + '|',
    ]
    for row in document['rows']:
        other = [row['beside'], row['beside_ms'], row['ratio']] if row['beside'] else ['nothing', '', '']
        lines.append('| ' + ' | '.join(map(str, [row['op'], row['ms'], *other])) + ' |')
    return '\n'.join(lines)


def main() -> None:
    """Run all cases, or write the table of a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--turns', type=int, default=9)
    parser.add_argument('--out', type=Path)
    parser.add_argument('--docs', action='store_true', help='write the table of --out into docs/mmcv_ops_speed.md')
    args = parser.parse_args()
    if args.docs:
        document = json.loads(args.out.read_text(encoding='utf-8'))
        measure.write_docs(table(document), 'benchmarks/mmcv_ops.py', ROOT / 'docs' / 'mmcv_ops_speed.md')
        return
    torch.set_num_threads(args.threads)

    ours, theirs = stand_in(), compiled()
    cases = {
        'nms': nms_case,
        'softnms': softnms_case,
        'roi_align forward': roi_align_case(False),
        'roi_align backward': roi_align_case(True),
        'modulated_deform_conv forward': deform_conv_case,
    }
    rows = []
    for name, make in cases.items():
        runs = []
        for ops in (ours, theirs):
            torch.manual_seed(0)
            runs.append(make(ops, args.device) if ops else None)
        rows.append(compare(name, 'compiled', *runs, args))
    for queries in (1000, 10000):
        for way, backward in (('forward', False), ('both ways', True)):
            torch.manual_seed(0)
            pair = attention_cases(queries, backward, ours, args.device)
            rows.append(compare(f'ms_deform_attn {queries} {way}', 'plain PyTorch', *pair, args))
    if args.out:
        where = measure.machine() if args.device == 'cuda' else cpu_machine()
        versions = {name: version(name) for name in ('torch', 'torchvision')} | {'mmcv': mmcv_version()}
        document = {'machine': where, 'threads': args.threads, 'versions': versions, 'rows': rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=2) + '\n')


if __name__ == '__main__':
    main()
