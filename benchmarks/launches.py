"""How many calls a training step dispatches, without a GPU: what the host has to do for each.

    python -m benchmarks.launches                 # MILA-T, ConvNeXt-T, ResNet-50, the plain transcription
    python -m benchmarks.launches --inside        # MILA-T, counted inside the registered ops as well
    python -m benchmarks.launches --details mila

Calls that are not views, forward and backward of a small image under CPU autocast in bf16. A registered op of the
package counts once. ``--inside`` counts its PyTorch calls and its kernel launches instead, as on a GPU, with launches
that do nothing; allocations are calls too.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pretend import pretended_gpu
from benchmarks.transcription import TranscribedMILA


class Calls(TorchDispatchMode):
    """Counts the calls that PyTorch dispatches, without views.

    Args:
        implementations: The package's ops by their name, to count inside of them as well.
    """

    def __init__(self, implementations: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.implementations = implementations or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count and call."""
        inside = self.implementations.get(func._schema.name.removeprefix('mila_mm::'))
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        if self.implementations and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:  # inside of an op a call comes before PyTorch has taken it apart
                return func.decompose(*args, **(kwargs or {}))
        if not func.is_view:
            self.counts[func._schema.name.removeprefix('aten::')] += 1
        return func(*args, **(kwargs or {}))


def train_step(model: nn.Module, image: torch.Tensor) -> None:
    """Forward and backward under autocast; the gradients are dropped."""
    with torch.autocast('cpu', torch.bfloat16):
        maps = model(image)
    torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
    model.zero_grad(set_to_none=True)


def mila(arch: str = 'tiny', **options: Any) -> nn.Module:
    """Ours, as it runs on a GPU."""
    from mila_mm.models import MILATrunk

    return MILATrunk(arch, **{'fused': True, **options})


def timm_model(name: str) -> nn.Module:
    """A backbone of timm that returns its maps."""
    import timm

    return timm.create_model(name, pretrained=False, features_only=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    'mila': mila,
    'mila-unfused': lambda: mila(fused=False),
    'transcription': lambda: TranscribedMILA('tiny'),
    'convnext': lambda: timm_model('convnext_tiny'),
    'resnet50': lambda: timm_model('resnet50'),
}


def count(model: nn.Module, side: int = 64) -> Counter[str]:
    """Calls of a training step by name."""
    image = torch.zeros(1, 3, side, side)
    train_step(model.train(), image)  # tables and caches are made
    with Calls() as calls:
        train_step(model, image)
    return calls.counts


def count_inside(model: nn.Module, side: int = 64) -> Counter[str]:
    """The same as on a GPU: PyTorch's calls inside of the package's ops too, and kernels by their name."""
    from mila_mm.ops.common import IMPLEMENTATIONS

    image = torch.zeros(1, 3, side, side)
    with pretended_gpu() as launches:
        train_step(model.train(), image)
        launches.clear()
        with Calls(IMPLEMENTATIONS) as calls:
            train_step(model, image)
        return calls.counts + Counter({f'kernel {name}': times for name, times in launches.items()})


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--inside', action='store_true', help='inside of the registered ops as well, ours alone')
    parser.add_argument('--details', choices=list(MODELS), help='one model, call by call')
    parser.add_argument('--side', type=int, default=64, help='of the image [64]')
    args = parser.parse_args()
    names = [args.details] if args.details else ['mila'] if args.inside else list(MODELS)
    for name in names:
        calls = (count_inside if args.inside else count)(MODELS[name](), args.side)
        if args.details:
            print('\n'.join(f'{times:6d} {call}' for call, times in calls.most_common()))
        print(f'{name}: {calls.total()} calls{" inside of the ops as well" if args.inside else ""}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
