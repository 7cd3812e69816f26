"""Whether modules are still what was built: nothing put in their place, and nobody who listens to their calls."""

from __future__ import annotations

import torch
from torch import nn


def why_not_plain(name: str, module: nn.Module | None, kind: type[nn.Module]) -> str | None:
    """Why the forward of a module has to be called, and not its parameters read; None where either will do."""
    if type(module) is not kind:
        return f'{name} is a {type(module).__name__}, expected {kind.__name__}'
    if torch.compiler.is_compiling():
        return None  # Dynamo does not trace the rest; it calls hooks of a module only where its forward is called
    state = module.__dict__
    if (
        state['_forward_hooks']
        or state['_forward_pre_hooks']
        or state['_backward_hooks']
        or state['_backward_pre_hooks']
    ):
        return f'{name} has hooks'
    return f'{name} has a forward of its own' if 'forward' in state else None
