"""What the host needs for a training step, without a GPU: ours over ConvNeXt-T's, in one run.

    python -m benchmarks.host_time

Both models are so narrow that arithmetic does not count: MILA-T's depths at widths 16 to 128, ConvNeXt-T's at the same.
The launchers of our kernels run and their launches do nothing; the rest is PyTorch on one thread of the CPU, forward
and backward of two small images under autocast in bf16, in time of the processor. Rounds alternate, so that a noisy
machine disturbs both; the ratio is the median of the rounds' ratios. On a GPU the launches themselves come on top, for
either model. A second pair of models has the stochastic depth that the shipped configs have.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import time

import torch
from torch import nn

from benchmarks.launches import mila, train_step
from benchmarks.pretend import pretended_gpu

WIDTHS = (16, 32, 64, 128)
DROP_PATH = 0.2
"""Stochastic depth of the shipped UperNet with MILA-T; Mask R-CNN has 0.1."""


def narrow_mila(drop_path: float = 0.0) -> nn.Module:
    """MILA-T's depths; heads of 16 channels, the narrowest that the kernels take."""
    arch = {'embed_dim': WIDTHS[0], 'depths': (2, 4, 8, 4), 'num_heads': (1, 2, 4, 8)}
    return mila(arch, drop_path_rate=drop_path)


def narrow_convnext(drop_path: float = 0.0) -> nn.Module:
    """ConvNeXt-T's depths."""
    import timm

    return timm.create_model('convnext_tiny', features_only=True, dims=WIDTHS, drop_path_rate=drop_path)


def milliseconds(model: nn.Module, image: torch.Tensor) -> float:
    """Time of one step that the process has been running: by wall clock others on the machine would count too."""
    start = time.process_time()
    train_step(model, image)
    return 1e3 * (time.process_time() - start)


def main() -> int:
    """Measure and print; the last line is ``ratio X``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=31)
    parser.add_argument('--side', type=int, default=32, help='of the two images [32]')
    parser.add_argument('--profile', action='store_true', help='print where our Python spends its time instead')
    args = parser.parse_args()
    torch.set_num_threads(1)
    image = torch.zeros(2, 3, args.side, args.side)
    rates = (0.0,) if args.profile else (DROP_PATH, 0.0)
    makers = {'mila': narrow_mila, 'convnext': narrow_convnext}
    models = {(name, rate): make(rate).train() for rate in rates for name, make in makers.items()}
    times: dict[tuple[str, float], list[float]] = {key: [] for key in models}
    with pretended_gpu() as launches:
        for model in models.values():
            for _ in range(5):
                train_step(model, image)
        if args.profile:
            with cProfile.Profile() as profile:
                for _ in range(args.rounds):
                    train_step(models['mila', 0.0], image)
            pstats.Stats(profile).sort_stats('tottime').print_stats(45)
            return 0
        launches.clear()
        for _ in range(args.rounds):
            for key, model in models.items():
                times[key].append(milliseconds(model, image))
    for (name, rate), each in times.items():
        depth = f'{name}, stochastic depth {rate}' if rate else name
        print(f'{depth}: {statistics.median(each):.1f} ms a step, fastest {min(each):.1f}')
    print(f'kernels of ours launched in a step: {launches.total() // (args.rounds * len(rates))}')
    for rate in rates:
        ratios = [ours / theirs for ours, theirs in zip(times['mila', rate], times['convnext', rate], strict=True)]
        print(f'{f"stochastic depth {rate}: " if rate else ""}ratio {statistics.median(ratios):.2f}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
