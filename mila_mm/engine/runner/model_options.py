"""Options of a config that change how a built model computes, and not what."""

from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mila_mm.errors import UserError


def apply_model_options(model: nn.Module, cfg: Config) -> nn.Module:
    """Apply ``channels_last`` and ``compile_backbone`` of a config.

    ``channels_last=True`` lays out the images and the weights of all convolutions so, which convolutions on a GPU with
    tensor cores prefer. ``compile_backbone=True``, or a dict of arguments of :func:`torch.compile`, compiles
    the backbone alone: detectors compute their losses in Python that depends on the data, where mmengine's
    own ``compile`` (of the whole training step) breaks the program up and compiles for every batch anew.

    Args:
        cfg: Config, which may have these entries.

    Raises:
        UserError: If the model has no backbone, or an option is of a wrong type.
    """
    if cfg.get('channels_last'):
        model.to(memory_format=torch.channels_last)
        _backbone_of(model, 'channels_last').register_forward_pre_hook(_to_channels_last)
    options = cfg.get('compile_backbone')
    if options is not None and not isinstance(options, (bool, dict)):
        raise UserError(f'compile_backbone: expected True, False or arguments of torch.compile, got {options!r}')
    if options or isinstance(options, dict):
        # Sizes differ from batch to batch in detection: a program for each would be compiled until dynamo gives up.
        arguments = {'dynamic': True} | (options if isinstance(options, dict) else {})
        _backbone_of(model, 'compile_backbone').compile(**arguments)
    return model


def _backbone_of(model: nn.Module, option: str) -> nn.Module:
    inner = getattr(model, 'module', model)  # of a model for test-time augmentation
    backbone = getattr(inner, 'backbone', None)
    if not isinstance(backbone, nn.Module):
        raise UserError(f'{option}: the model {type(inner).__name__} has no backbone')
    return backbone


def _to_channels_last(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x for x in args
    )
