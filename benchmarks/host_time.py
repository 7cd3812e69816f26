"""What the host needs for a training step, without a GPU: ours over ConvNeXt-T's, in one run.

    python -m benchmarks.host_time

Both models are so narrow that arithmetic does not count: MILA-T's depths at widths 16 to 128, ConvNeXt-T's at the same.
The launchers of our kernels run and their launches do nothing; the rest is PyTorch on one thread of the CPU, forward
and backward of two small images under autocast in bf16, in time of the processor. Rounds alternate, so that a noisy
machine disturbs both; the ratio is the median of the rounds' ratios. On a GPU the launches themselves come on top, for
either model.
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


def narrow_mila(fused: bool = True) -> nn.Module:
    """MILA-T's depths; heads of 16 channels, the narrowest that the kernels take."""
    return mila({'embed_dim': WIDTHS[0], 'depths': (2, 4, 8, 4), 'num_heads': (1, 2, 4, 8)}, fused=fused)


def narrow_convnext() -> nn.Module:
    """ConvNeXt-T's depths."""
    import timm

    return timm.create_model('convnext_tiny', pretrained=False, features_only=True, dims=WIDTHS)


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
    models = {'mila': narrow_mila().train(), 'convnext': narrow_convnext().train()}
    times: dict[str, list[float]] = {name: [] for name in models}
    with pretended_gpu() as launches:
        for model in models.values():
            for _ in range(5):
                train_step(model, image)
        if args.profile:
            with cProfile.Profile() as profile:
                for _ in range(args.rounds):
                    train_step(models['mila'], image)
            pstats.Stats(profile).sort_stats('tottime').print_stats(45)
            return 0
        launches.clear()
        for _ in range(args.rounds):
            for name, model in models.items():
                times[name].append(milliseconds(model, image))
    for name, each in times.items():
        print(f'{name}: {statistics.median(each):.1f} ms a step, fastest {min(each):.1f}')
    print(f'kernels of ours launched in a step: {launches.total() // args.rounds}')
    ratios = [ours / theirs for ours, theirs in zip(times['mila'], times['convnext'], strict=True)]
    print(f'ratio {statistics.median(ratios):.2f}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
