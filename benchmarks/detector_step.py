"""Training steps of Mask R-CNN per second with different backbones in the same detector, in one run.

    python -m benchmarks.detector_step                                               # 800 x 1333, B=2, on a GPU
    python -m benchmarks.detector_step --image 96 128 --runs 2 --narrow --threads 2  # a trial on a CPU

mmdet's Mask R-CNN with FPN on random images with eight boxes and masks each: preprocessing, forward, losses, backward
and fused AdamW, under autocast unless fp32 is asked for; no data loading, no distribution. ResNet-50 and Swin-T are
mmdet's, ConvNeXt-T is timm's as it comes. All start from random weights. The rounds go through all backbones in turn,
so that a machine that slows down slows all of them; each figure is the median of its rounds, by wall clock.

Beside it stands the device's own time. A detector samples boxes as its data say and waits for the device in between,
so that no CUDA graph holds its step: for the whole step it is the sum over the kernels of one step, for the backbone's
part the replay of a CUDA graph of its forward and backward on the same images.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

import mila_mm  # noqa: F401 - before anything imports mmcv
from benchmarks import measure
from benchmarks.backbone_cpu import machine as cpu_machine
from mila_mm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

BACKBONES: dict[str, dict[str, Any]] = {
    'MILA-T': dict(backbone=dict(type='mila_mm.MILA', arch='tiny', drop_path_rate=0.1), widths=[64, 128, 256, 512]),
    'MILA-T-modules': dict(
        backbone=dict(type='mila_mm.MILA', arch='tiny', drop_path_rate=0.1, fused=False), widths=[64, 128, 256, 512]
    ),
    'MILA-T-graphs': dict(
        backbone=dict(type='mila_mm.MILA', arch='tiny', drop_path_rate=0.1), widths=[64, 128, 256, 512], graphs=True
    ),
    'ResNet-50': dict(
        backbone=dict(
            type='ResNet',
            depth=50,
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            frozen_stages=1,
            norm_cfg=dict(type='BN', requires_grad=True),
            norm_eval=True,
        ),
        widths=[256, 512, 1024, 2048],
    ),
    'Swin-T': dict(
        backbone=dict(
            type='SwinTransformer',
            embed_dims=96,
            depths=[2, 2, 6, 2],
            num_heads=[3, 6, 12, 24],
            window_size=7,
            drop_path_rate=0.2,
        ),
        widths=[96, 192, 384, 768],
    ),
    'ConvNeXt-T': dict(
        backbone=dict(type='TimmFeatures', name='convnext_tiny', drop_path_rate=0.2), widths=[96, 192, 384, 768]
    ),
}
DTYPES = ['bf16', 'fp16', 'fp32']


@MODELS.register_module()
class TimmFeatures(nn.Module):
    """A backbone of timm: the maps of strides 4 to 32.

    Args:
        name: Name of a timm model.
        **options: Of the model.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        import timm

        self.model = timm.create_model(name, pretrained=False, features_only=True, **options)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image to maps."""
        return tuple(self.model(x))


class Trainee:
    """A detector with its optimizer and one batch.

    Args:
        name: A key of :data:`BACKBONES`.
    """

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        from mmdet.testing import demo_mm_inputs

        from mila_mm.engine.optimizers.amp import AmpOptimWrapper

        cfg = Config.fromfile(ROOT / 'configs/_base_/models/mask_rcnn_mila.py')
        choice = deepcopy(BACKBONES[name])
        cfg.model.backbone = ConfigDict(choice['backbone'])
        cfg.model.neck.in_channels = choice['widths']
        if args.narrow:
            cfg.model.rpn_head.feat_channels = 16
            cfg.model.roi_head.bbox_head.fc_out_channels = 16
            cfg.model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        torch.manual_seed(0)
        self.device, self.dtype = 'cuda' if torch.cuda.is_available() else 'cpu', args.dtype
        self.model = MODELS.build(cfg.model).to(self.device).train()
        if choice.get('graphs') and self.device == 'cuda':
            from mila_mm.nn.cuda_graphs import BackboneGraphs

            self.model.backbone.forward = BackboneGraphs(self.model.backbone)
        if args.channels_last:
            self.model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=self.device == 'cuda')
        self.wrapper = (
            OptimWrapper(optimizer) if args.dtype == 'fp32' else AmpOptimWrapper(args.dtype, optimizer=optimizer)
        )
        self.data = demo_mm_inputs(
            args.batch,
            [(3, *args.image)] * args.batch,
            num_items=[8] * args.batch,
            num_classes=80,
            with_mask=True,
            device=self.device,
        )

    def step(self) -> float:
        """Train once; the seconds it took."""
        data = deepcopy(self.data)
        self._wait()
        start = time.perf_counter()
        losses = self.model.train_step(data, self.wrapper)
        self._wait()
        seconds = time.perf_counter() - start
        if not bool(losses['loss'].isfinite()):
            sys.exit(f'the loss is {losses["loss"].item()}: expected a finite one, its time means nothing')
        return seconds

    def backbone_graph(self) -> dict[str, float] | None:
        """Time of the backbone's forward and backward replayed from a CUDA graph; None where it cannot be captured."""
        backbone = self.model.backbone
        if 'forward' in vars(backbone):  # from graphs already, which hold no others
            return None
        with torch.no_grad():
            images = self.model.data_preprocessor(deepcopy(self.data), True)['inputs']
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(self.dtype)

        def both() -> None:
            with torch.autocast(self.device, dtype, enabled=dtype is not None, cache_enabled=False):
                maps = backbone(images)
            torch.autograd.grad(maps, parameters, [torch.ones_like(x) for x in maps], allow_unused=True)

        return measure.timed_graph(both)

    def _wait(self) -> None:
        if self.device == 'cuda':
            torch.cuda.synchronize()


def described(trainee: Trainee, warmup: int) -> dict[str, Any]:
    """What is known of a backbone's step before it is timed; the first steps are taken here."""
    for _ in range(warmup):
        trainee.step()
    row: dict[str, Any] = {'parameters': sum(p.numel() for p in trainee.model.parameters())}
    if trainee.device == 'cuda':
        # Beyond what all the models hold together: parameters and the optimizer's state of one are added again.
        held = sum(x.numel() * x.element_size() for x in trainee.model.parameters())
        row['peak_bytes'] = measure.peak_bytes(trainee.step) + 3 * held
        launched = measure.kernels(trainee.step)
        assert launched is not None, 'a rehearsal beside a GPU'
        row |= {'kernels': int(launched['count']), 'kernels_ms': launched['ms']}
        row['backbone_graph'] = trainee.backbone_graph()
    return row


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """All rows of the result."""
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in args.backbones}
    trainees: dict[str, Trainee] = {}
    for name in args.backbones:
        rows[name] = {
            'backbone': name,
            'image': list(args.image),
            'batch': args.batch,
            'dtype': args.dtype,
            'channels_last': args.channels_last,
            'narrow_heads': args.narrow,
        }
        try:
            trainee = Trainee(name, args)
            rows[name] |= described(trainee, args.warmup)
        except (RuntimeError, UserError) as error:  # the other backbones still have their figures
            rows[name]['failure'] = f'{type(error).__name__}: {str(error).splitlines()[0]}'
            print(f'{name}: {rows[name]["failure"]}', file=sys.stderr)
        else:
            trainees[name] = trainee
    for _ in range(args.runs):
        for name, trainee in trainees.items():
            times[name].append(trainee.step())
    for name in trainees:
        seconds = statistics.median(times[name])
        rows[name] |= {
            'ms': 1e3 * seconds,
            'fastest_ms': 1e3 * min(times[name]),
            'runs': args.runs,
            'images_per_second': args.batch / seconds,
        }
    return {
        'benchmark': 'detector_step',
        'machine': measure.machine() if torch.cuda.is_available() else cpu_machine(),
        'rows': list(rows.values()),
    }


def table(document: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine, first = document['machine'], document['rows'][0]
    lines = [
        f'{machine.get("gpu", machine.get("cpu"))}, torch {machine["torch"]}, {machine["date"][:10]}; '
        f'{" x ".join(map(str, first["image"]))}, B={first["batch"]}, {first["dtype"]}'
        + (', heads narrowed for a trial' if first['narrow_heads'] else ''),
        '',
        '| backbone | parameters of the detector | ms a step, wall | its kernels, ms | backbone alone, device, ms | '
        'images/s | kernels a step | peak GiB |',
        '| --- ' * 8 + '|',
    ]
    for row in document['rows']:
        if 'failure' in row:
            lines.append(f'| {row["backbone"]} | {row["failure"]} |')
            continue
        peak = f'{row["peak_bytes"] / 2**30:.2f}' if 'peak_bytes' in row else 'not measured'
        busy = f'{row["kernels_ms"]:.1f}' if 'kernels_ms' in row else 'not measured'
        graph = row.get('backbone_graph')
        alone = 'not measured' if graph is None else f'{graph["median"]:.2f}'
        lines.append(
            f'| {row["backbone"]} | {row["parameters"] / 1e6:.1f} M | {row["ms"]:.1f} | {busy} | {alone} | '
            f'{row["images_per_second"]:.2f} | {row.get("kernels", "not counted")} | {peak} |'
        )
    return '\n'.join(lines)


def main() -> int:
    """Parse, measure, print, save. Returns 1 where a backbone could not train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbones', nargs='+', default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument('--image', type=int, nargs=2, default=[800, 1333], metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--dtype', default='bf16', choices=DTYPES)
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--narrow', action='store_true', help='narrow heads: to try the script, not to compare')
    parser.add_argument('--warmup', type=int, default=3)
    parser.add_argument('--runs', type=int, default=20)
    parser.add_argument('--threads', type=int, default=0, help='of the CPU [as torch chooses]')
    parser.add_argument('--out', type=Path, help='[benchmarks/results/detector_step.json on a GPU, else nothing]')
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    DefaultScope.get_instance('detector_step', scope_name='mmdet')
    document = benchmark(args)
    print(table(document))
    out = args.out or (measure.RESULTS / 'detector_step.json' if torch.cuda.is_available() else None)
    if out is not None:
        measure.save(out, document)
    return 1 if any('failure' in row for row in document['rows']) else 0


if __name__ == '__main__':
    sys.exit(main())
