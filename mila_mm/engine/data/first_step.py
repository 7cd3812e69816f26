"""What shows only in the first training step, named by the part of the model that it happens in."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mila_mm.engine.config.load import one_line
from mila_mm.engine.data.one_value import ONE_VALUE
from mila_mm.errors import UserError

_LOOK = 'mila check-data CONFIG looks at all labels'
# What torch and mmengine say, and what it comes of.
_MISFITS = {
    r'expected input.* to have (?P<takes>\d+) channels, but got (?P<given>\d+) channels': (
        '{where} takes {takes} channels and is given {given}: set in_channels of that part'
    ),
    r'mat1 and mat2 shapes cannot be multiplied \((?P<given>\w+) and (?P<takes>\w+)\)': (
        '{where} takes rows of another width than it is given (rows {given}, weights {takes})'
    ),
    r'Expected more than 1 value per channel': f'{{where}}: {ONE_VALUE.replace("{", "{{")}',
    r'Target (?P<label>-?\d+) is out of bounds': (
        '{where}: label {label} is of no class of this head: num_classes is too small, or the labels are wrong; '
        + _LOOK
    ),
    r'device-side assert triggered': (
        '{where}: an assertion failed on the GPU, as with labels that are of no class of the head; ' + _LOOK
    ),
    r'weight tensor should be defined either for all': (
        '{where}: class_weight has not one weight for each class ({text})'
    ),
    r'Cannot find valid image after': (
        'train_dataloader.dataset: no sample survives the pipeline, its transforms drop every one ({text})'
    ),
}


@contextmanager
def naming_parts(runner: Runner) -> Iterator[None]:
    """Turn misfits between parts of a model, and between model and labels, into messages that name them.

    Raises:
        UserError: In these cases; everything else passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _misfit(getattr(runner, 'model', None), error)
        if message is None:
            raise
        raise UserError(message) from error


def _misfit(model: Any, error: Exception) -> str | None:
    """Return what an error that came up in a model is about, None where it is none of the known misfits."""
    text = one_line(error)
    for pattern, told in _MISFITS.items():
        match = re.search(pattern, text)
        if match:
            return told.format(where=_module_of(model, error), text=text, **match.groupdict())
    return None


def _module_of(model: Any, error: Exception) -> str:
    """Return the name of the innermost named part of the model in which an error came up."""
    names = {id(module): name for name, module in model.named_modules()} if isinstance(model, nn.Module) else {}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        name = names.get(id(frame.f_locals.get('self')))
        if name:
            return f'model.{name.removeprefix("module.")}'
    return 'model'


class BatchNormWatch:
    """Refuse a BatchNorm over a single value, now or in the last batch of an epoch, at the first forward.

    MILA's own are left alone: beside a hook its layers take another way, which rounds otherwise, and a resumed run
    would not repeat the step bit for bit. torch refuses a single value there too, and :func:`naming_parts` says it.

    Args:
        last_batch: Images in the last batch of an epoch on one process.
    """

    def __init__(self, model: nn.Module, last_batch: int) -> None:
        # Here and not above: with it comes timm, a second's work that no message about a config should wait for.
        from mila_mm.nn.trunk import Trunk

        self._last_batch = last_batch
        ours = {id(inner) for trunk in model.modules() if isinstance(trunk, Trunk) for inner in trunk.modules()}
        self._handles = [
            module.register_forward_pre_hook(lambda layer, inputs, n=name: self._look(n, layer, inputs))
            for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and id(module) not in ours
        ]

    def _look(self, name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not layer.training or not inputs or not isinstance(inputs[0], torch.Tensor) or inputs[0].dim() < 2:
            return
        given = inputs[0]
        values = given.numel() // max(given.shape[1], 1)
        here = f'model.{name.removeprefix("module.")}'
        if values == 1:
            raise UserError(f'{here}: {ONE_VALUE}')
        if self._last_batch == 1 and values == given.shape[0]:
            raise UserError(
                f'{here}: {ONE_VALUE}\n'
                'It is the last batch of an epoch that has one image: train_dataloader.drop_last=True leaves it out.'
            )

    def stop(self) -> None:
        """Look no longer."""
        for handle in self._handles:
            handle.remove()
