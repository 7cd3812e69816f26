"""Try a model: build it with zeros for weights, compute its training loss on generated data, see what it reads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from mila_mm.swap.light import WITHOUT_BEARING, build, graph_behind, in_scope, reason_of, sorted_config
from mila_mm.swap.samples import make_batch

# Small and odd first; then what a neck needs whose maps must halve exactly; then what a fixed pyramid needs.
EVEN = (128, 160)
SIZES = ((127, 161), EVEN, (320, 320))


class TrialFailed(Exception):
    """A model could not be built or run; the message is the reason."""


@dataclass(frozen=True)
class Trial:
    """What a model's run has shown.

    Attributes:
        used: Indices of the backbone's maps that the losses depend on.
        parameters: Names of all parameters.
        size: Height and width of the images.
    """

    used: tuple[int, ...]
    parameters: tuple[str, ...]
    size: tuple[int, int]


def try_model(model: dict[str, Any], scope: str) -> Trial:
    """Build a model and compute its losses on generated data.

    Args:
        model: Its config.
        scope: 'mmdet' or 'mmseg'.

    Returns:
        What was seen.

    Raises:
        TrialFailed: If the model cannot be built or run, with the reason.
    """
    key = repr(sorted_config(model, WITHOUT_BEARING))
    return _try_once(_Hashed(key, model, scope))


@dataclass(frozen=True)
class _Hashed:
    key: str
    model: dict[str, Any]
    scope: str

    def __hash__(self) -> int:
        return hash((self.key, self.scope))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and (self.key, self.scope) == (other.key, other.scope)


def _try_once(subject: _Hashed) -> Trial:
    outcome = _outcome(subject)
    if isinstance(outcome, str):
        raise TrialFailed(outcome)
    return outcome


@lru_cache(maxsize=512)
def _outcome(subject: _Hashed) -> Trial | str:
    try:
        module = revert_sync_batchnorm(build(for_trial(subject.model, subject.scope), subject.scope))
        module.train()
    except Exception as error:  # noqa: BLE001 - any error of a constructor is the finding
        return reason_of(error)
    for size in SIZES:
        try:
            return _run(module, subject, size)
        except Exception as error:  # noqa: BLE001 - any error of a forward is the finding
            reason = reason_of(error)
    return reason


def for_trial(model: dict[str, Any], scope: str) -> dict[str, Any]:
    """Return a copy of a model's config that takes images of any size as they are."""
    model = copy.deepcopy(model)
    preprocessor = model.get('data_preprocessor')
    if not isinstance(preprocessor, dict):
        model['data_preprocessor'] = dict(type='DetDataPreprocessor' if scope == 'mmdet' else 'SegDataPreProcessor')
    else:
        preprocessor.pop('batch_augments', None)
        if scope == 'mmseg':
            for key in ('size', 'size_divisor', 'test_cfg'):
                preprocessor.pop(key, None)
    return model


def _run(module: nn.Module, subject: _Hashed, size: tuple[int, int]) -> Trial:
    outputs: list[Any] = []
    hook = module.backbone.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with in_scope(subject.scope), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            batch = make_batch(subject.model, subject.scope, size)
            preprocessor = module.data_preprocessor
            if subject.scope == 'mmseg':
                preprocessor.size = size
            data = preprocessor(batch, True)
            losses = module(**data, mode='loss')
    finally:
        hook.remove()
    maps = outputs[-1] if outputs else ()
    maps = [maps] if isinstance(maps, Tensor) else maps
    nodes = graph_behind([sum_of_losses(losses)])
    used = tuple(i for i, m in enumerate(maps) if isinstance(m, Tensor) and m.grad_fn in nodes)
    return Trial(used, tuple(name for name, _ in module.named_parameters()), size)


def sum_of_losses(losses: Any) -> Tensor:
    """Add up all tensors of a dict of losses that have a gradient.

    Args:
        losses: Tensors, dicts and lists of them.

    Returns:
        A scalar.

    Raises:
        ValueError: If none has a gradient.
    """
    leaves = [leaf.sum() for leaf in _tensors(losses) if leaf.requires_grad]
    if not leaves:
        raise ValueError('no loss depends on the weights')
    return torch.stack(leaves).sum()


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from _tensors(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _tensors(value)
