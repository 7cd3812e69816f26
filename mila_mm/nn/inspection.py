"""What of a block, a stem or a downsampling can be read in place of calling its modules, and whether it still can."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mila_mm.nn import block_node
from mila_mm.nn.layers import Block, ConvLayer, DepthwiseConv, LinearAttention, Mlp
from mila_mm.nn.plain import why_not_plain

_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    ('cpe1', DepthwiseConv),
    ('norm1', nn.LayerNorm),
    ('in_proj', nn.Linear),
    ('act_proj', nn.Linear),
    ('dwc', DepthwiseConv),
    ('attn', LinearAttention),
    ('out_proj', nn.Linear),
    ('cpe2', DepthwiseConv),
    ('norm2', nn.LayerNorm),
    ('mlp', Mlp),
)
_INNER = {'attn': (('qk', nn.Linear), ('lepe', nn.Conv2d)), 'mlp': (('fc1', nn.Linear), ('fc2', nn.Linear))}

# The 3x3 convolutions among a block's parameters, whose kernels read as many numbers as MILA's have.
_STENCILS = tuple(block_node.PARAMETERS.index(f'{name}.weight') for name in ('cpe1', 'dwc', 'attn.lepe', 'cpe2'))


def _read(name: str, module: nn.Module, found: dict[str, Tensor]) -> str | None:
    """Add weight and bias of a module to ``found``; why not, where they are no plain parameters."""
    for key in ('weight', 'bias'):
        value = module._parameters.get(key)
        if type(value) is not nn.Parameter:
            return f'{name}.{key} is no plain parameter (sharded, parametrised or removed)'
        found[f'{name}.{key}'] = value
    return None


def _inspect(prefix: str, owner: nn.Module, parts: Any, found: dict[str, Tensor]) -> str | None:
    modules = owner._modules
    for name, kind in parts:
        module, path = modules.get(name), prefix + name
        if (reason := why_not_plain(path, module, kind)) is not None:
            return reason
        assert module is not None
        inner = _INNER.get(name)
        reason = _read(path, module, found) if inner is None else _inspect(f'{path}.', module, inner, found)
        if reason is not None:
            return reason
    return None


def parameters_of(block: nn.Module) -> tuple[Tensor, ...] | str:
    """The parameters of a block in the order of its node, or why it has to run module by module."""
    found: dict[str, Tensor] = {}
    reason = why_not_plain('block', block, Block) or _inspect('', block, _PARTS, found)
    if reason is not None:
        return reason
    assert isinstance(block, Block) and isinstance(block.attn, LinearAttention)
    if block.attn.backend == 'reference':
        return "attn_backend='reference'"
    drop = block._modules['drop_path']
    if (
        drop is None
        or type(drop) not in (DropPath, nn.Identity)
        or why_not_plain('drop_path', drop, type(drop)) is not None
    ):
        return f'drop_path is a {type(drop).__name__}, or has hooks'
    params = tuple(found[name] for name in block_node.PARAMETERS)
    channels = params[4].shape[1]
    stencils = [block.get_submodule(name) for name in ('cpe1', 'dwc', 'cpe2')]
    odd = any(params[index].shape != (channels, 1, 3, 3) for index in _STENCILS)
    if odd or params[4].shape[0] != channels or any(conv.padding != (1, 1) for conv in stencils):
        return 'another kernel size or inner width than those of MILA'
    first = params[0]
    if any(p.dtype != first.dtype or p.device != first.device or not p.is_contiguous() for p in params):
        return 'parameters of several dtypes, devices or layouts'
    return params


def layers_of(module: nn.Module | None, kind: type[nn.Module]) -> list[ConvLayer] | None:
    """The convolutions of a stem or downsampling in their order; None where somebody has changed or hooked one."""
    if module is None or type(module) is not kind:
        return None
    found: list[nn.Module | None] = []
    for child in module._modules.values():
        if type(child) is ConvLayer:
            found.append(child)
        elif child is not None and why_not_plain('', child, nn.Sequential) is None:
            found.extend(child._modules.values())
        else:
            return None
    layers: list[ConvLayer] = []
    for layer in found:
        if why_not_plain('', layer, ConvLayer) is not None:
            return None
        assert isinstance(layer, ConvLayer)
        if not _plain_convolution(layer._modules['conv']):
            return None
        layers.append(layer)
    return layers


def _plain_convolution(conv: nn.Module | None) -> bool:
    if conv is None or why_not_plain('', conv, nn.Conv2d) is not None:
        return False
    weight, bias = conv._parameters['weight'], conv._parameters['bias']
    if type(weight) is not nn.Parameter or type(bias) not in (nn.Parameter, type(None)):
        return False
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return dense and weight.dtype == torch.float32


class Watch:
    """Whether a module is as it was when it was inspected, at a tenth of the price.

    It watches the module and all in it: their classes, hooks and forwards, which modules and parameters they have, and
    where in memory those are, which another dtype, device or layout would change. Whoever inspects again is on the
    safe side.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = list(root.modules())
        self._kinds = [type(module) for module in self._modules]
        owned = [held for m in self._modules for held in (m._modules, m._parameters)]
        self._slots = [(held, name) for held in owned for name in held]
        self._ids = [id(held[name]) for held, name in self._slots]
        # Kept alive, so that nothing new can have the id of one of them.
        self._values = [held[name] for held, name in self._slots]
        self._parameters = [value for value in self._values if type(value) is nn.Parameter]
        self._addresses = [p.data_ptr() for p in self._parameters]

    def holds(self) -> bool:
        """True where nothing has been changed or hooked."""
        for module in self._modules:
            state = module.__dict__
            if (
                state['_forward_hooks']
                or state['_forward_pre_hooks']
                or state['_backward_hooks']
                or state['_backward_pre_hooks']
                or 'forward' in state
            ):
                return False
        return (
            [type(module) for module in self._modules] == self._kinds
            and [id(held.get(name)) for held, name in self._slots] == self._ids
            and [p.data_ptr() for p in self._parameters] == self._addresses
        )
