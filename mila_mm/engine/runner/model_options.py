"""Options of a config that change how a built model computes, and not what."""

from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from torch import Tensor, nn

from mila_mm.engine.runner.sharded_model import BLOCKS, units_of
from mila_mm.engine.runner.sharding import cuts_up
from mila_mm.errors import UserError
from mila_mm.nn.cuda_graphs import BackboneGraphs, why_not_graphs


def apply_model_options(model: nn.Module, cfg: Config) -> nn.Module:
    """Apply ``channels_last``, ``compile_backbone`` and ``graph_backbone`` of a config.

    ``channels_last=True`` lays out the images and the weights of all convolutions so, which convolutions on a GPU with
    tensor cores prefer. ``compile_backbone=True``, or a dict of arguments of :func:`torch.compile`, compiles
    the backbone alone: detectors compute their losses in Python that depends on the data, where mmengine's
    own ``compile`` (of the whole training step) breaks the program up and compiles for every batch anew. Of a model
    that is sharded each unit is compiled by itself.
    ``graph_backbone=True``, or ``dict(shapes=N)`` for graphs of so many shapes instead of 8, launches the backbone from
    CUDA graphs (:mod:`mila_mm.nn.cuda_graphs`): for images of few shapes.

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
        backbone, wrapper = _backbone_of(model, 'compile_backbone'), cfg.get('model_wrapper_cfg')
        if cuts_up(wrapper):  # the parameters of a unit are gathered before it computes, which no program holds
            for unit in units_of(backbone, wrapper.get('shard_modules', BLOCKS)):
                unit.compile(**arguments)
        else:
            if arguments['dynamic'] is not False:
                # DistributedDataParallel's own splitting of programs fails on sizes that are not fixed
                torch._dynamo.config.optimize_ddp = False
            backbone.compile(**arguments)
    graphs = cfg.get('graph_backbone')
    if graphs or isinstance(graphs, dict):
        if options or isinstance(options, dict):
            raise UserError(
                'graph_backbone: expected no compile_backbone beside it\nFor graphs of a compiled backbone: '
                '--cfg-options compile_backbone.mode=reduce-overhead, without graph_backbone'
            )
        if cuts_up(cfg.get('model_wrapper_cfg')):
            raise UserError('graph_backbone: expected no sharded model: its parameters are elsewhere in each step')
        _use_graphs(_backbone_of(model, 'graph_backbone'), graphs)
    return model


def _use_graphs(backbone: nn.Module, options: Any) -> None:
    shapes = options.get('shapes', 8) if isinstance(options, dict) and set(options) <= {'shapes'} else options
    shapes = 8 if shapes is True else shapes
    if type(shapes) is not int or shapes < 1:
        raise UserError(f'graph_backbone: expected True, False or dict(shapes=N) with N of 1 or more, got {options!r}')
    if get_device() != 'cuda':
        raise UserError(f'graph_backbone: expected an NVIDIA GPU, got {get_device()}')
    if (reason := why_not_graphs(backbone)) is not None:
        raise UserError(f'graph_backbone: {reason}')
    backbone.forward = BackboneGraphs(backbone, shapes)


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
