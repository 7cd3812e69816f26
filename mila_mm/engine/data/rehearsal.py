"""A forward pass of shapes alone, on torch's meta device, to find parts of a model that do not fit each other."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from mmengine.dist import get_world_size
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mila_mm.datasets.checks.findings import Finding, error
from mila_mm.engine.data.channels import check_given
from mila_mm.engine.data.one_value import ONE_VALUE
from mila_mm.engine.data.splits import kind_name
from mila_mm.engine.random_state import capture_random_state, restore_random_state

# Sides of the image where the config says none: large enough that no level of a pyramid is a single value.
_SIDE = 640
_DENSE = ('rpn_head', 'bbox_head', 'mask_head', 'auxiliary_head')
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def rehearse(
    model: nn.Module, config: dict[str, Any], images: int, size: tuple[int, int] | None = None
) -> list[Finding]:
    """Take the shapes of a training batch through backbone, neck and heads.

    Only what is sure is told: channels that do not fit, and a BatchNorm that sees one value. A part that does not
    run without data, or has no kernel for shapes alone, is left to the first step, which names its misfits too.

    Args:
        model: A detector or segmentor of mmdet or mmseg; it is left as it is.
        config: Its config.
        images: Images in a batch on one process.
        size: Height and width of an image in pixels. Defaults to 640 x 640.
    """
    state = capture_random_state()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            twin = without_values(model).train()
            suspects = _watch(twin)
            batch = torch.empty(images, 3, *(size or (_SIDE, _SIDE)), device='meta')
            for run in _steps(twin, batch):
                suspects.clear()
                with suppress(Exception):  # what does not run on shapes alone says nothing by itself
                    run()
                if suspects:
                    told = suspects[-1]
                    return _better(twin, config, batch) or [error('', told)]
    except Exception:  # noqa: BLE001 - nor does what cannot be copied
        return []
    finally:
        restore_random_state(state)
    return []


def _watch(model: nn.Module) -> list[str]:
    """Let each layer of a model that is given something unfit say so, in a list from which it strikes that once done.

    A layer may have a ``forward`` of its own that takes what looks unfit; so only what failed as well stays there.
    """
    suspects: list[str] = []
    together = get_world_size() > 1  # then a synchronised BatchNorm sees the other processes' values too
    for name, module in model.named_modules():
        doubt: Callable[[str, Any, torch.Tensor], str | None]
        if isinstance(module, _CONVOLUTIONS):
            doubt = _other_channels
        elif isinstance(module, _BatchNorm) and not (together and isinstance(module, nn.SyncBatchNorm)):
            doubt = _one_value
        elif isinstance(module, nn.Linear) and name.startswith('roi_head.'):
            doubt = _other_rows  # elsewhere rows may be as wide as the image is large
        else:
            continue

        def before(layer: nn.Module, inputs: tuple[Any, ...], name: str = f'model.{name}', doubt: Any = doubt) -> None:
            given = inputs[0] if inputs else None
            told = doubt(name, layer, given) if isinstance(given, torch.Tensor) and given.dim() > 1 else None
            layer.suspected = told  # type: ignore[assignment]
            suspects.extend([told] if told else [])

        def after(layer: nn.Module, *_: Any) -> None:
            if layer.suspected:
                suspects.pop()

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    return suspects


def _other_channels(name: str, layer: Any, given: torch.Tensor) -> str | None:
    return _says(name, 'channels', layer.in_channels, given.shape[1])


def _other_rows(name: str, layer: Any, given: torch.Tensor) -> str | None:
    return _says(name, 'values a row', layer.in_features, given.shape[-1])


def _says(name: str, unit: str, takes: int, given: int) -> str | None:
    if takes == given:
        return None
    return f'{name} takes {takes} {unit} and is given {given}: set in_channels of that part, or what comes before it'


def _one_value(name: str, layer: nn.Module, given: torch.Tensor) -> str | None:
    return f'{name}: {ONE_VALUE}' if layer.training and given.numel() == given.shape[1] else None


def _better(model: Any, config: dict[str, Any], batch: torch.Tensor) -> list[Finding]:
    """Name the key of the config, where it is what comes next after the backbone that does not fit."""
    try:
        given = [maps.shape[1] for maps in model.backbone(batch)]
    except Exception:  # noqa: BLE001 - the backbone itself does not fit, or gives something else than maps
        return []
    return check_given(config, given, kind_name(config.get('backbone')))


def without_values(model: nn.Module) -> nn.Module:
    """Copy a model with parameters and buffers of the same shapes and types, and no memory behind them."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        shape = tensor.detach().to('meta')
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
    return copy.deepcopy(model, memo)


def _steps(model: Any, batch: torch.Tensor) -> Iterator[Callable[[], Any]]:
    """Yield calls one by one: what comes before the heads, and each head."""
    features: list[Any] = []
    yield lambda: features.append(model.extract_feat(batch))
    if not features:
        return
    for name in _DENSE:
        for head in _each(getattr(model, name, None)):
            yield partial(head, features[0])
    for head in _each(getattr(model, 'decode_head', None))[:1]:  # a cascade's others take what the first one gives
        yield partial(head, features[0])
    yield from _second_stage(getattr(model, 'roi_head', None), features[0])


def _second_stage(roi_head: Any, features: Any) -> Iterator[Callable[[], Any]]:
    """Give the heads of regions what their extractors cut out of the maps."""
    if roi_head is None or getattr(roi_head, 'with_shared_head', False) or not isinstance(features, (list, tuple)):
        return
    for name in ('bbox', 'mask'):
        extractors = _each(getattr(roi_head, f'{name}_roi_extractor', None))
        for extractor, head in zip(extractors, _each(getattr(roi_head, f'{name}_head', None)), strict=False):
            if type(extractor).__name__ == 'SingleRoIExtractor':
                sides = extractor.roi_layers[0].output_size
                yield partial(head, torch.empty(2, features[0].shape[1], *sides, device='meta'))


def _each(part: Any) -> list[nn.Module]:
    if isinstance(part, nn.ModuleList):
        return list(part)
    return [part] if isinstance(part, nn.Module) else []
