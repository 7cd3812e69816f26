"""A GPU that is not there: the launchers of the kernels run on CPU tensors, and their launches do nothing.

Results are then whatever memory held: this is for what the host does, how often and how long, and for nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


class _Compiled:
    """What Triton returns from a launch, as far as it is looked at."""

    function = object()
    packed_metadata = (4, 1, 0)

    def __init__(self, name: str, launches: Counter[str]) -> None:
        def run(*_: object) -> None:
            launches[name] += 1

        self.run = run


@contextmanager
def pretended_gpu() -> Iterator[Counter[str]]:
    """Let CPU tensors pass for a GPU's in the package's ops; yields how often each kernel was launched."""
    from triton.runtime.jit import KernelInterface

    from mila_mm.ops.triton import capability, configs

    launches: Counter[str] = Counter()

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*_: object, **__: object) -> _Compiled:
            launches[kernel.fn.__name__] += 1
            return _Compiled(kernel.fn.__name__, launches)

        return launch

    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    with ExitStack() as stack:
        for owner, name, stand_in in [
            (KernelInterface, '__getitem__', launcher),
            (torch.Tensor, 'is_cuda', True),
            (torch.cuda, 'current_device', lambda: None),  # the index of the device of a CPU tensor
            (torch.cuda, 'device', lambda device: nullcontext()),
            (capability, '_why_not_here', lambda device: None),
            (configs, 'is_hopper', lambda device: False),
        ]:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        try:
            from mila_mm.ops.triton import kept
        except ImportError:  # every launch goes through Triton's JIT
            pass
        else:
            kept.clear()
            stack.callback(kept.clear)
            stack.enter_context(mock.patch.object(kept, 'driver', SimpleNamespace(active=active)))
        yield launches
