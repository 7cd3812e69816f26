"""Memory of segmenting one image by its side: mmseg's sliding windows and mila_mm's tiles.

    python -m benchmarks.tiled                          # writes benchmarks/results/tiled.json and prints the table
    python -m benchmarks.tiled --sides 1024 2048

UperNet with MILA nano and 19 classes, windows of 512 at a distance of 384. Each case runs in a process of its own. The
figure of the host is the growth of the process's peak memory over that before the image was made: image, labels and
logits. On a GPU there is also the peak of CUDA's allocator, which must not grow for tiles.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

TILE, STRIDE, CLASSES = 512, 384, 19
SLIDE_LIMIT = 4096
"""Side up to which mmseg's windows are run: their memory grows with the square."""


def peak_rss() -> int:
    """Peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one(mode: str, side: int) -> dict[str, Any]:
    """Segment one random image; called in a fresh process."""
    import torch
    from mmengine.config import Config, ConfigDict
    from mmengine.registry import MODELS, DefaultScope
    from mmseg.structures import SegDataSample

    from mila_mm.models import TiledSegmentor

    torch.manual_seed(0)
    DefaultScope.get_instance('tiled', scope_name='mmseg')
    cfg = Config.fromfile(ROOT / 'configs/demo/upernet_mila_nano_shapes.py').model
    cfg.decode_head.num_classes = cfg.auxiliary_head.num_classes = CLASSES
    cfg.data_preprocessor.pop('size')
    cfg.test_cfg = ConfigDict(mode='slide', crop_size=(TILE, TILE), stride=(STRIDE, STRIDE))
    model = MODELS.build(cfg).eval()
    if torch.cuda.is_available():
        model.cuda()
    tester = TiledSegmentor(model, (TILE, TILE), (STRIDE, STRIDE)) if mode == 'tiles' else model

    def segment(size: int) -> None:
        meta = dict(ori_shape=(size, size), img_shape=(size, size), pad_shape=(size, size))
        image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
        with torch.no_grad():
            tester.test_step(dict(inputs=[image], data_samples=[SegDataSample(metainfo=meta)]))

    segment(TILE)  # what the first window costs in libraries and buffers is not the image's
    before = peak_rss()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    segment(side)
    row = {'mode': mode, 'side': side, 'host_bytes': peak_rss() - before, 'seconds': time.perf_counter() - start}
    row['device_bytes'] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return row


def table(document: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine = document['machine']
    lines = [
        f'{machine.get("gpu", machine.get("cpu"))}, torch {machine["torch"]}, {machine["date"][:10]}',
        '',
        '| side of the image | windows of mmseg: host MiB, GPU MiB | tiles: host MiB, GPU MiB |',
        '| --- ' * 3 + '|',
    ]
    by_key = {(row['mode'], row['side']): row for row in document['rows']}
    for side in sorted({row['side'] for row in document['rows']}):
        cells = []
        for mode in ('slide', 'tiles'):
            row = by_key.get((mode, side))
            if row is None:
                cells.append('not run')
                continue
            device = 'no GPU' if row['device_bytes'] is None else f'{row["device_bytes"] / 2**20:.0f}'
            cells.append(f'{row["host_bytes"] / 2**20:.0f}, {device}')
        lines.append(f'| {side} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main() -> int:
    """Run each case in its process, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sides', type=int, nargs='+', default=[1024, 2048, 4096, 8192])
    parser.add_argument('--one', nargs=2, metavar=('MODE', 'SIDE'), help=argparse.SUPPRESS)
    parser.add_argument('--out', type=Path)
    parser.add_argument('--docs', action='store_true', help='write the table of --out into docs/large_images.md')
    args = parser.parse_args()
    import mila_mm  # noqa: F401 - before anything imports mmcv

    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]))))
        return 0
    import torch

    from benchmarks import measure
    from benchmarks.backbone_cpu import machine as cpu_machine

    out = args.out or measure.RESULTS / 'tiled.json'
    if args.docs:
        text = table(json.loads(out.read_text(encoding='utf-8')))
        measure.write_docs(text, 'benchmarks/tiled.py', ROOT / 'docs' / 'large_images.md')
        return 0
    rows = []
    for side in args.sides:
        for mode in ('slide', 'tiles') if side <= SLIDE_LIMIT else ('tiles',):
            command = [sys.executable, '-m', 'benchmarks.tiled', '--one', mode, str(side)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f'{mode} at {side} failed:\n{done.stderr[-2000:]}')
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    document = {
        'benchmark': 'tiled',
        'machine': measure.machine() if torch.cuda.is_available() else cpu_machine(),
        'tile': TILE,
        'stride': STRIDE,
        'classes': CLASSES,
        'rows': rows,
    }
    print(table(document))
    measure.save(out, document)
    return 0


if __name__ == '__main__':
    sys.exit(main())
