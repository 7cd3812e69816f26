"""Which blocks of a pass run as one node each, on weights cast at once, and why others do not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

from mila_mm.nn import block_node
from mila_mm.nn.layers import Block, ConvLayer, DepthwiseConv, Downsample, LinearAttention, Mlp, Stem
from mila_mm.nn.step_weights import Castable, Casted
from mila_mm.ops import why_not_triton_stencil
from mila_mm.ops.common import autocast_dtype, transformed

_logger = logging.getLogger('mila_mm')
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
_LOW = (torch.bfloat16, torch.float16)


def _why_not_plain(name: str, module: nn.Module | None, kind: type[nn.Module]) -> str | None:
    """Why a module's forward has to be called: it is not what was built, or somebody listens."""
    if type(module) is not kind:
        return f'{name} is a {type(module).__name__}, expected {kind.__name__}'
    state = module.__dict__
    if state['_forward_hooks'] or state['_forward_pre_hooks'] or state['_backward_hooks'] or state['_backward_pre_hooks']:
        return f'{name} has hooks'
    return f'{name} has a forward of its own' if 'forward' in state else None


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
        if (reason := _why_not_plain(path, module, kind)) is not None:
            return reason
        inner = _INNER.get(name)
        reason = _read(path, module, found) if inner is None else _inspect(f'{path}.', module, inner, found)
        if reason is not None:
            return reason
    return None


def parameters_of(block: nn.Module) -> tuple[Tensor, ...] | str:
    """The parameters of a block in the order of its node, or why it has to run module by module."""
    found: dict[str, Tensor] = {}
    reason = _why_not_plain('block', block, Block) or _inspect('', block, _PARTS, found)
    if reason is not None:
        return reason
    if block.attn.backend == 'reference':
        return "attn_backend='reference'"
    drop = block._modules['drop_path']
    if type(drop) not in (DropPath, nn.Identity) or _why_not_plain('drop_path', drop, type(drop)) is not None:
        return f'drop_path is a {type(drop).__name__}, or has hooks'
    params = tuple(found[name] for name in block_node.PARAMETERS)
    if block.dwc.kernel_size != (3, 3) or params[4].shape[0] != params[4].shape[1]:
        return 'another kernel size or inner width than those of MILA'
    first = params[0]
    if any(p.dtype != first.dtype or p.device != first.device or not p.is_contiguous() for p in params):
        return 'parameters of several dtypes, devices or layouts'
    return params


def _layers_of(module: nn.Module, kind: type[nn.Module]) -> list[ConvLayer] | None:
    """The convolutions of a stem or downsampling in their order; None where somebody has changed or hooked one."""
    if type(module) is not kind:
        return None
    layers = [m for m in module.modules() if isinstance(m, (ConvLayer, nn.Sequential, nn.Conv2d))]
    for each in layers:
        if _why_not_plain('', each, type(each)) is not None:
            return None
        if isinstance(each, nn.Conv2d) and not _plain_convolution(each):
            return None
    return [each for each in layers if isinstance(each, ConvLayer)]


def _plain_convolution(conv: nn.Conv2d) -> bool:
    plain = type(conv) is nn.Conv2d and type(conv._parameters['weight']) is nn.Parameter
    bias = conv._parameters['bias']
    dense = plain and (
        conv.weight.is_contiguous() or conv.weight.is_contiguous(memory_format=torch.channels_last)
    )
    return dense and (bias is None or type(bias) is nn.Parameter) and conv.weight.dtype == torch.float32


class Pass(NamedTuple):
    """What a pass of a trunk runs on.

    Attributes:
        calls: For each block, by its id, the call of its node and its parameters.
        convolutions: For stem and downsamplings, by their id, weights and biases of their convolutions, cast.
        device: Type of the device.
    """

    calls: dict[int, tuple[block_node.Call, tuple[Tensor, ...]]]
    convolutions: dict[int, list[tuple[Tensor, Tensor | None]]]
    device: str


class FastPath:
    """Prepares the passes of a trunk. It keeps what does not change from pass to pass; a copy begins empty."""

    def __init__(self) -> None:
        self._key: Any = None
        self._castable: Castable | None = None
        self._said: set[str] = set()

    def __deepcopy__(self, memo: Any) -> FastPath:
        return FastPath()

    def __reduce__(self) -> tuple[type[FastPath], tuple[()]]:
        return FastPath, ()

    def _say(self, reason: str) -> None:
        """Log a reason, once for each model."""
        if reason not in self._said:
            self._said.add(reason)
            _logger.warning('MILA: blocks run module by module, which takes the host longer: %s', reason)
