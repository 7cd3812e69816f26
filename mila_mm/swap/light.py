"""Build parts of a model from their configs without the cost of their weights, and see what maps they hand on."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mila_mm.engine.config.load import REGISTRY_PREFIX, one_line
from mila_mm.swap.result import Maps, SwapRefused

# Height and width of the image for the maps: multiples of 64, not square, large enough for every pyramid.
Size = tuple[int, int]
PROBE_SIZE: Size = (512, 640)
SMALL_SIZE: Size = (128, 160)
_BATCH = 2
_LARGEST = 1e4  # beyond it a weight is no initial value but a remnant

# What two models may differ in that no backbone can tell: one trial serves both.
WITHOUT_BEARING = (
    'init_cfg',
    'pretrained',
    '_scope_',
    'num_classes',
    'class_weight',
    'loss_weight',
    'test_cfg',
    'mean',
    'std',
    'bgr_to_rgb',
    'size',
    'drop_path_rate',
)
_WEIGHT_KEYS = ('init_cfg', 'pretrained', 'checkpoint', 'teacher_ckpt')
SITE_PACKAGES = re.compile(r'/[^\s\'"]*/site-packages/')
_FILLS = {getattr(Tensor, name) for name in ('normal_', 'uniform_', 'erfinv_', 'exponential_', 'log_normal_')}
_FACTORIES = {torch.empty, torch.randn, torch.rand}
# Constructors compute with these in Python (rates by depth, indices): they need values also on the meta device.
_NUMBERS = {torch.linspace, torch.arange, torch.tensor}


class _ZeroWeights(TorchFunctionMode):
    """Zeros in place of every random or uninitialised tensor: cheap, finite, and the same at every call."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0].zero_()
        if func in _FACTORIES:
            return torch.zeros(*args, **{k: v for k, v in kwargs.items() if k not in ('generator', 'memory_format')})
        if func in _NUMBERS:
            kwargs.setdefault('device', 'cpu')
        return func(*args, **kwargs)


@contextmanager
def in_scope(scope: str) -> Iterator[None]:
    """Let the registries resolve names in a library, without the chatter of what is built.

    Some heads ask for the iteration and the epoch that a runner would be in: the first.
    """
    hub = MessageHub.get_current_instance()
    for name in ('iter', 'epoch'):
        if hub.get_info(name) is None:
            hub.update_info(name, 0)
    loggers = [logging.getLogger(name) for name in ('mmengine', 'current')]
    levels = [logger.level for logger in loggers]
    with DefaultScope.overwrite_default_scope(scope), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def build(cfg: Any, scope: str, device: str = 'cpu') -> nn.Module:
    """Build a module with zeros for weights and nothing downloaded.

    Args:
        cfg: Its config; not changed. A list builds a chain.
        scope: 'mmdet' or 'mmseg'.
        device: 'cpu', or 'meta' for no memory at all. Defaults to 'cpu'.
    """
    cfg = _dotted(_without_weights(cfg))
    with in_scope(scope), torch.random.fork_rng(devices=[]), torch.device(device), _ZeroWeights():
        module = MODELS.build(cfg)
    # torch.Tensor(3, 4) is no function: its memory comes as it is
    for tensor in module.parameters():
        if tensor.device.type == 'cpu':
            tensor.data.masked_fill_(~(tensor.detach().abs() < _LARGEST), 0)
    return module


def _dotted(cfg: Any) -> Any:
    """Return a config whose dicts allow attribute access, which constructors rely on."""
    return [ConfigDict(part) for part in cfg] if isinstance(cfg, (list, tuple)) else ConfigDict(cfg)


def _without_weights(cfg: Any) -> Any:
    """Return a copy of a model's config that names no weights, so that building it reads no file or address."""
    if isinstance(cfg, dict):
        return {k: _without_weights(v) for k, v in cfg.items() if k not in _WEIGHT_KEYS}
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(_without_weights(v) for v in cfg)
    return copy.copy(cfg)


def reason_of(error: BaseException) -> str:
    """Return the message of an error on one line, without what mmengine's registries put before it."""
    text = REGISTRY_PREFIX.sub('', one_line(error, limit=2000))
    text = text.partition('. Please check whether')[0].replace(' is not in the', ' is not in the', 1)
    name = type(error).__name__
    text = text if text.startswith(name) else f'{name}: {text}'
    text = SITE_PACKAGES.sub('', text)
    return text if len(text) <= 240 else text[:237] + '...'


def run_part(
    cfg: Any, scope: str, inputs: Callable[[str, Size], Any], training: bool = False, size: Size = PROBE_SIZE
) -> tuple[nn.Module, Any, Size]:
    """Build a part and run it, on the meta device if it can, else on zeros on the CPU.

    Args:
        scope: 'mmdet' or 'mmseg'.
        inputs: Makes its inputs on a device for an image of some height and width.
        size: Height and width of the image; the default becomes :data:`SMALL_SIZE` on the CPU.

    Returns:
        The module, its outputs, and the size.

    Raises:
        Exception: Whatever the part raises on the CPU.
    """
    try:
        module = build(cfg, scope, 'meta').to('meta')
        module.train(training)  # in a line of its own: some backbones return None here
        with in_scope(scope):
            return module, module(inputs('meta', size)), size
    except Exception:  # noqa: BLE001 - ops without a meta kernel raise all sorts; the CPU tells the true error
        size = SMALL_SIZE if size == PROBE_SIZE else size
        module = build(cfg, scope)
        module.train(training)
        with in_scope(scope), torch.no_grad():
            return module, module(inputs('cpu', size)), size


def image(device: str, size: Size, channels: int = 3) -> Tensor:
    """Return a batch of empty images."""
    return torch.zeros(_BATCH, channels, *size, device=device)


def features(maps: Maps, device: str, size: Size) -> tuple[Tensor, ...]:
    """Return empty feature maps of an image."""
    return tuple(
        torch.zeros(_BATCH, channels or 1, -(-size[0] // stride), -(-size[1] // stride), device=device)
        for channels, stride in zip(maps.channels, maps.strides, strict=True)
    )


def maps_of(output: Any, what: str, size: Size) -> Maps:
    """Describe what a backbone or neck returned.

    Args:
        output: A tensor, or a sequence of tensors, (B, C, H, W) each.
        size: Height and width of the image.

    Raises:
        SwapRefused: If it is something else.
    """
    output = [output] if isinstance(output, Tensor) else output
    if not isinstance(output, (list, tuple)) or not output:
        raise SwapRefused(f'{what} returns a {type(output).__name__}, not feature maps')
    for item in output:
        if isinstance(item, (list, tuple)):
            raise SwapRefused(f'{what} returns class tokens beside its maps, which the heads read; MILA has none')
        if isinstance(item, Tensor) and item.dim() == 2:
            raise SwapRefused(f'{what} returns vectors of {item.shape[1]}, not maps: it works on a fixed input grid')
        if not isinstance(item, Tensor) or item.dim() != 4:
            shape = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
            raise SwapRefused(f'{what} returns {shape} among its outputs, not only feature maps of (B, C, H, W)')
    strides = tuple(max(1, round(size[0] / item.shape[2])) for item in output)
    return Maps(tuple(item.shape[1] for item in output), strides)


def graph_behind(tensors: Iterable[Tensor]) -> set[Any]:
    """Return all nodes of the autograd graph behind some tensors."""
    seen: set[Any] = set()
    todo = [tensor.grad_fn for tensor in tensors]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return seen


def sorted_config(node: Any, ignored: Sequence[str] = ('init_cfg', 'pretrained')) -> Any:
    """Return a config as something with a stable ``repr``: dicts as sorted pairs, some keys left out."""
    if isinstance(node, dict):
        return sorted((str(k), sorted_config(v, ignored)) for k, v in node.items() if k not in ignored)
    if isinstance(node, (list, tuple)):
        return [sorted_config(v, ignored) for v in node]
    return node
