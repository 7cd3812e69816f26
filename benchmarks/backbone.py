"""A whole MILA backbone on a GPU: step time, kernels and peak memory, against a transcription and other backbones.

    python -m benchmarks.backbone                             # MILA-T, to benchmarks/results/backbone.json
    python -m benchmarks.backbone --resume                    # what an interrupted run has not measured
    python -m benchmarks.report benchmarks/results/backbone.json

Training is forward and backward under autocast, without an optimizer; by wall clock, and by the replay of a CUDA graph
of the same step, which is the device's own time. ``ours`` is ours as it comes, ``ours-fused`` has a block's three parts
fused and ``ours-modules`` nothing; ``ours-compiled`` goes through torch.compile, ``ours-graphs`` is launched from CUDA
graphs (``graph_backbone``). All share their weights, and their outputs are compared before any timing. ResNet-50,
Swin-T and ConvNeXt-T are timm's, where it is installed. Needs neither mmengine nor mmcv: :class:`MILATrunk` is
``mila_mm.MILA`` without the contract of OpenMMLab.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.attention_op import SIZES, size
from benchmarks.transcription import TranscribedMILA

# Root mean square difference between the maps of two implementations in one dtype.
LIMITS = {'bf16': 5e-2, 'fp16': 1e-2, 'fp32': 1e-4}
PARTS = ('cpe_norm', 'dwc_silu', 'projections')
OURS = {'ours': 'auto', 'ours-fused': PARTS, 'ours-modules': False, 'ours-compiled': 'auto', 'ours-graphs': 'auto'}
PEERS = {'resnet50': 'resnet50', 'swin-t': 'swin_tiny_patch4_window7_224', 'convnext-t': 'convnext_tiny'}
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}


def trunk(arch: str, backend: str, fused: Any = 'auto') -> nn.Module:
    """``MILATrunk``, also on a machine that has no timm."""
    if importlib.util.find_spec('timm') is None:
        names = ('timm', 'timm.layers', 'timm.models', 'timm.models._features')
        modules = {name: types.ModuleType(name) for name in names}
        modules['timm.layers'].DropPath = lambda rate=0.0: nn.Identity()  # all rates are 0 here
        # What the classifier imports; nothing here makes one.
        modules['timm.layers'].create_classifier = modules['timm.models._features'].feature_take_indices = None
        sys.modules |= modules
    from mila_mm.models import MILATrunk

    return MILATrunk(arch, attn_backend=backend, fused=fused)


def peer(name: str) -> nn.Module:
    """A backbone of timm that returns its maps, for any size of image."""
    import timm

    options = {'strict_img_size': False} if name == 'swin-t' else {}
    return timm.create_model(PEERS[name], pretrained=False, features_only=True, **options).to(measure.DEVICE)


def models(arch: str, names: list[str], backend: str) -> dict[str, nn.Module]:
    """The implementations on the GPU; all of MILA with the same weights."""
    torch.manual_seed(0)
    eager = TranscribedMILA(arch).to(measure.DEVICE)
    made: dict[str, nn.Module] = {}
    for name in names:
        if name == 'eager':
            made[name] = eager
            continue
        if name in PEERS:
            made[name] = peer(name)
            continue
        model = TranscribedMILA(arch) if name == 'compiled' else trunk(arch, backend, OURS[name])
        model.load_state_dict(eager.state_dict())
        model.to(measure.DEVICE)
        if name == 'ours-graphs':
            from mila_mm.nn.cuda_graphs import BackboneGraphs

            model.forward = BackboneGraphs(model)
        made[name] = torch.compile(model, dynamic=False) if name in ('compiled', 'ours-compiled') else model
    return made


def difference(model: nn.Module, other: nn.Module, dtype: torch.dtype) -> float:
    """The largest relative difference between the maps of two models on an awkward image, in eval mode."""
    image = torch.randn(2, 3, 197, 261, device=measure.DEVICE)

    def maps(m: nn.Module) -> tuple[Tensor, ...]:
        m.eval()
        with torch.no_grad(), torch.autocast(measure.DEVICE, dtype, enabled=dtype != torch.float32):
            result = m(image)
        m.train()
        return result

    pairs = zip(maps(model), maps(other), strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def measure_one(model: nn.Module, size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Times and peak memory of inference, and of forward and backward, on images of height, width and batch."""
    cast = dtype != torch.float32
    image = torch.randn(size[2], 3, *size[:2], device=measure.DEVICE)

    def forward() -> None:
        with torch.no_grad(), torch.autocast(measure.DEVICE, dtype, enabled=cast):
            model(image)

    def both() -> None:
        with torch.autocast(measure.DEVICE, dtype, enabled=cast):
            maps = model(image)
        torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
        model.zero_grad(set_to_none=True)

    def captured() -> None:
        with torch.autocast(measure.DEVICE, dtype, enabled=cast, cache_enabled=False):
            maps = model(image)
        torch.autograd.grad(maps, list(model.parameters()), [torch.ones_like(x) for x in maps], allow_unused=True)

    graphed = 'forward' in vars(model)  # from graphs already, which hold no others
    model.eval()
    result: dict[str, Any] = {
        'forward': measure.timed(forward),
        'forward_graph': None if graphed else measure.timed_graph(forward),
        'forward_kernels': measure.kernel_count(forward),
        'forward_peak_bytes': measure.peak_bytes(forward),
    }
    model.train()
    return result | {
        'both': measure.timed(both),
        'both_graph': None if graphed else measure.timed_graph(captured),
        'both_kernels': measure.kernel_count(both),
        'both_peak_bytes': measure.peak_bytes(both),
    }


def spent(times: dict[str, Any], key: str) -> str:
    """Milliseconds by wall clock and of the device, and kernels, as far as they are known."""
    graph, kernels = times.get(f'{key}_graph'), times.get(f'{key}_kernels')
    device = '' if graph is None else f', device {graph["median"]:.2f}'
    return f'wall {times[key]["median"]:.2f} ms{device}' + ('' if kernels is None else f', {kernels} kernels')


def measure_rows(args: argparse.Namespace, dtype_name: str, result: measure.Result) -> None:
    """Add the rows of one dtype that are not there yet."""
    dtype, wanted = DTYPES[dtype_name], {}
    for name in args.implementations:
        rows = [
            {'dtype': dtype_name, 'arch': args.arch, 'implementation': name, 'image': [height, width], 'batch': batch}
            for height, width, batch in args.sizes
        ]
        if missing := result.missing(rows):
            wanted[name] = missing
    if not wanted:
        return
    made = models(args.arch, ['eager', *(name for name in wanted if name != 'eager')], args.backend)
    for name, rows in wanted.items():
        model = made[name]
        error = 0.0 if name == 'eager' or name in PEERS else difference(model, made['eager'], dtype)
        correct = error <= LIMITS[dtype_name]
        print(f'{dtype_name} {name}: differs by {error:.1e}{"" if correct else " TOO MUCH, not timed"}')
        for row in rows:
            row.update(difference=error, correct=correct)
            if correct:
                torch._dynamo.reset()  # each size compiled for itself: past a limit it would run uncompiled
                image = *row['image'], row['batch']
                times = measure.out_of_memory_as_none(lambda: measure_one(model, image, dtype))  # noqa: B023
                row.update(times or {})
                print(
                    f'  {"x".join(map(str, image))}: '
                    + (
                        'out of memory'
                        if times is None
                        else f'forward {spent(times, "forward")}, both {spent(times, "both")}, '
                        f'peak {times["both_peak_bytes"] / 2**30:.2f} GiB'
                    )
                )
            result.add(row)


def main() -> int:
    """Parse, measure, save row by row. Returns 1 where our backbone was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='tiny', choices=['tiny', 'small', 'base'])
    parser.add_argument('--sizes', type=size, nargs='+', default=SIZES, metavar='HxWxB')
    parser.add_argument('--dtypes', nargs='+', default=['bf16', 'fp32'], choices=DTYPES)
    parser.add_argument(
        '--implementations',
        nargs='+',
        default=[*OURS, 'eager', 'compiled', *(PEERS if importlib.util.find_spec('timm') else ())],
        choices=['eager', 'compiled', *OURS, *PEERS],
    )
    parser.add_argument('--backend', default='triton', choices=['triton', 'reference'], help='of ours')
    parser.add_argument('--out', type=Path, default=measure.RESULTS / 'backbone.json')
    measure.add_resume(parser)
    args = parser.parse_args()
    measure.require_cuda()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 for all
    result = measure.Result(args.out, {'benchmark': 'backbone', 'machine': measure.machine()}, args.resume)
    for dtype in args.dtypes:
        measure_rows(args, dtype, result)
    print(f'wrote {args.out}')
    rows = [row for row in result.rows if row['implementation'].startswith('ours')]
    return 0 if all(row['correct'] for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
