"""MILA on a CPU against the plain transcription of its formulas: time forward, and forward + backward.

    python -m benchmarks.backbone_cpu                       # tiny at 512 x 512, 2 threads
    python -m benchmarks.backbone_cpu --arch base --size 800 1280 --threads 8

Both run on the same weights and their outputs are compared before any timing. Rounds alternate between the two, so that
a noisy machine disturbs both; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.transcription import TranscribedMILA
from mila_mm.models import MILATrunk

ROOT = Path(__file__).resolve().parent.parent


def forward(model: nn.Module, image: Tensor) -> None:
    """Inference: eval mode, no gradients."""
    with torch.inference_mode():
        model(image)


def forward_backward(model: nn.Module, image: Tensor) -> None:
    """A training step without an optimizer."""
    model.zero_grad()
    sum(m.square().mean() for m in model(image)).backward()


def seconds(function: Callable[[nn.Module, Tensor], None], model: nn.Module, image: Tensor) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function(model, image)
    return time.perf_counter() - start


def compare(
    models: dict[str, nn.Module],
    function: Callable[[nn.Module, Tensor], None],
    training: bool,
    image: Tensor,
    rounds: int,
) -> dict[str, float]:
    """Median seconds of each model, and the median and quartiles of the rounds' ratios."""
    for model in models.values():
        model.train(training)
        function(model, image)
    times = [{name: seconds(function, model, image) for name, model in models.items()} for _ in range(rounds)]
    ratios = [t['mila_mm'] / t['transcription'] for t in times]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        **{f'{name}_s': statistics.median(t[name] for t in times) for name in models},
        'ratio': quartiles[1],
        'ratio_q1': quartiles[0],
        'ratio_q3': quartiles[2],
    }


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    command = ['git', 'rev-parse', '--short', 'HEAD']
    commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        'cpu': names[0] if names else platform.processor(),
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'python': platform.python_version(),
        'commit': commit.stdout.strip(),
        'date': datetime.date.today().isoformat(),
    }


def main() -> int:
    """Compare, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', default='tiny', choices=('tiny', 'small', 'base'))
    parser.add_argument('--size', type=int, nargs=2, default=(512, 512), metavar=('H', 'W'))
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--out', type=Path, default=ROOT / 'benchmarks' / 'results' / 'backbone_cpu.json')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    models = {'transcription': TranscribedMILA(args.arch), 'mila_mm': MILATrunk(args.arch)}
    models['mila_mm'].load_state_dict(models['transcription'].state_dict())
    image = torch.randn(args.batch, 3, *args.size)
    for training in (False, True):
        with torch.no_grad():
            pairs = zip(*(model.train(training)(image) for model in models.values()), strict=True)
            error = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
        if error > 1e-4:
            raise SystemExit(f'outputs differ by {error:.1e} of the largest magnitude: timing means nothing')

    document = {
        'machine': machine(),
        'arch': args.arch,
        'size': list(args.size),
        'batch': args.batch,
        'forward': compare(models, forward, False, image, args.rounds),
        'forward_backward': compare(models, forward_backward, True, image, args.rounds),
    }
    for name in ('forward', 'forward_backward'):
        row = document[name]
        ours, theirs = (row[f'{key}_s'] * 1e3 for key in ('mila_mm', 'transcription'))
        print(
            f'{name:17s} transcription {theirs:7.1f} ms   mila_mm {ours:7.1f} ms   '
            f'ratio {row["ratio"]:.3f} ({row["ratio_q1"]:.3f} .. {row["ratio_q3"]:.3f})'
        )
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(document, indent=2) + '\n')
    print(f'written to {args.out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
