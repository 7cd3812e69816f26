"""What a resumed checkpoint says is data of a stranger: checked before it is an index, a count, a seed or a name.

The safe reader keeps a file from running code. Its numbers and names would still steer the run: mmengine takes them as
they are, puts the saved entries of a scheduler into the object's ``__dict__``, and counts epochs from what it finds.
Paths are not checked here but not taken at all: see :mod:`mila_mm.engine.runner.own_checkpoints`.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor
from torch.optim import Optimizer

from mila_mm.errors import printable
from mila_mm.weights.errors import CheckpointError

MAX_COUNT = 10**12
_MAX_SEED = 2**32 - 1  # of numpy
_MAX_NAME = 200
_COUNTS = ('epoch', 'iter', 'max_epochs', 'max_iters')
# What torch's GradScaler takes as it is.
_SCALER = {
    **dict.fromkeys(('scale', 'growth_factor', 'backoff_factor'), (int, float)),
    **dict.fromkeys(('growth_interval', '_growth_tracker'), (int,)),
}
# What mmengine's checkpoint hook removes files by.
REMOVED_BY = ('keep_ckpt_ids', 'best_ckpt')


def count(value: Any, what: str, most: int = MAX_COUNT) -> int:
    """Return a number out of a file if it can be one of epochs, iterations or batches.

    Args:
        value: Anything.
        what: What the number is, the first words of the message.
        most: The largest that is believed.

    Raises:
        CheckpointError: If it is not a whole number from 0 to ``most``; True and 3.0 are none.
    """
    if type(value) is not int or not 0 <= value <= most:
        raise CheckpointError(f'{what} is {shown(value)}, expected a whole number from 0 to {most}')
    return value


def shown(value: Any) -> str:
    """Return a value out of a file for a message: short, on one line, without control characters."""
    if isinstance(value, int) and value.bit_length() > 64:
        return 'a number of more than 64 bits'  # Python refuses to write out some
    return printable(repr(value), 80) if isinstance(value, (str, int, float, type(None))) else type(value).__name__


def check_resumed(checkpoint: dict[str, Any], source: str) -> None:
    """Check the position, the seeds and the message hub of a checkpoint, in place; a second call changes nothing.

    A position that cannot be one is an error. Of the message hub, what is of no use is dropped, and so is all that
    files would be removed by; what it called its best checkpoints stays as ``checkpoint['named_best']``.

    Args:
        checkpoint: What was read.
        source: Where from, for messages.

    Raises:
        CheckpointError: If training cannot continue from it.
    """
    absent = [name for name in ('meta', 'message_hub') if not checkpoint.get('meta') or name not in checkpoint]
    if absent:
        raise CheckpointError(
            f'{source} holds weights but no state of a training run (no {absent[0]!r})\n'
            'To start a new training from these weights: --cfg-options load_from=FILE'
        )
    meta = _mapping(checkpoint['meta'], f'{source}: meta')
    for name in ('epoch', 'iter'):
        count(meta.get(name), f'{source}: its meta.{name}')
    if meta.get('seed') is not None:
        count(meta['seed'], f'{source}: its meta.seed', _MAX_SEED)
    for name in ('validated_iter', 'sampler_seed'):
        if checkpoint.get(name) is not None:
            count(checkpoint[name], f'{source}: its {name}')
    if checkpoint.get('position') is not None:
        position = _mapping(checkpoint['position'], f'{source}: its position')
        length = count(position.get('length'), f'{source}: its position.length')
        count(position.get('batches'), f'{source}: its position.batches', length)
    if checkpoint.get('ema_state_dict') is not None:
        _check_averaged(checkpoint['ema_state_dict'], checkpoint.get('state_dict'), source)
    hub = _mapping(checkpoint['message_hub'], f'{source}: its message_hub')
    info = _mapping(hub.get('runtime_info', {}), f'{source}: its message_hub.runtime_info')
    earlier = checkpoint.get('named_best')
    checkpoint['named_best'] = {
        key: name
        for key, name in {**(earlier if isinstance(earlier, dict) else {}), **info}.items()
        if isinstance(name, str) and isinstance(key, str) and key.startswith('best_ckpt')
    }
    checkpoint['message_hub'] = _checked_hub(hub, source)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f'{what} is {shown(value)}, expected a dict')
    return value


def _check_averaged(averaged: Any, weights: Any, source: str) -> None:
    """Check that averaged weights are those of the weights beside them, with which they are exchanged by name."""
    averaged = _mapping(averaged, f'{source}: its ema_state_dict')
    weights = _mapping(weights, f'{source}: its state_dict')
    for key, value in averaged.items():
        what = f'{source}: its ema_state_dict[{shown(key)}]'
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f'{what} is {shown(value)}, expected a tensor with a name')
        if key.startswith('module.'):
            weight = weights.get(key.removeprefix('module.'))
            if not isinstance(weight, Tensor) or weight.shape != value.shape:
                raise CheckpointError(f'{what} has the shape {tuple(value.shape)}, the state_dict no such tensor')
    if 'steps' in averaged:
        steps = averaged['steps']
        count(steps.item() if steps.numel() == 1 else None, f'{source}: its ema_state_dict.steps')


def _checked_hub(hub: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """Return a message hub with what mmengine and its log can use."""
    parts = {name: hub.get(name, {}) for name in ('log_scalars', 'runtime_info', 'resumed_keys')}
    for name, part in parts.items():
        _mapping(part, f'{source}: its message_hub.{name}')
    # The names of scalars stand in every line of the log.
    scalars = {
        key: value
        for key, value in parts['log_scalars'].items()
        if _is_name(key) and isinstance(value, HistoryBuffer) and len(value.data[0])
    }
    info = {key: value for key, value in parts['runtime_info'].items() if _is_name(key) and _is_usable(key, value)}
    resumed = {key: bool(value) for key, value in parts['resumed_keys'].items() if key in scalars or key in info}
    return dict(log_scalars=scalars, runtime_info=info, resumed_keys=resumed)


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isprintable() and len(key) <= _MAX_NAME


def _is_usable(key: str, value: Any) -> bool:
    if key.startswith(REMOVED_BY):
        return False
    if key == 'last_ckpt':
        return isinstance(value, str) and value.isprintable()
    if key in _COUNTS:
        return type(value) is int and 0 <= value <= MAX_COUNT
    if key.startswith('best_score'):
        return _is_number(value) and not math.isnan(value)
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, np.number)) and not isinstance(value, (bool, np.bool_))


def check_groups(checkpoint: Mapping[str, Any], source: str) -> None:
    """Check that optimizers and schedulers of a checkpoint are laid out as such, whatever run they are of.

    Raises:
        CheckpointError: If not.
    """
    saved = checkpoint.get('optimizer', {})
    _mapping(saved, f'{source}: its optimizer')
    for state in [saved] if 'param_groups' in saved else saved.values():
        groups = _mapping(state, f'{source}: its optimizer').get('param_groups')
        if not isinstance(groups, list) or None in map(_group_size, groups):
            raise CheckpointError(f'{source}: its optimizer has no readable list of groups')
        _mapping(state.get('state'), f'{source}: its optimizer.state')
        for index, group in enumerate(groups):
            for key in ('lr', 'initial_lr', 'weight_decay'):
                if group.get(key) is not None and not _is_number(_number(group[key])):
                    what = f'{source}: its optimizer.param_groups[{index}].{key}'
                    raise CheckpointError(f'{what} is {shown(group[key])}, expected a number')
    states = checkpoint.get('param_schedulers', [])
    for each in states.values() if isinstance(states, Mapping) else [states]:
        if not isinstance(each, list) or not all(isinstance(state, Mapping) for state in each):
            raise CheckpointError(f'{source}: its param_schedulers are {shown(each)}, expected a list of dicts')


def check_schedulers(states: Any, schedulers: Any, source: str) -> Any:
    """Return the saved states of schedulers with the entries alone that these schedulers have, of the same kinds.

    Args:
        states: What the checkpoint holds: a list, or one for each optimizer by name.
        schedulers: Those of the run, laid out alike.
        source: Where the states come from, for messages.

    Raises:
        CheckpointError: If an entry is of another kind, or a list of values of another length.
    """
    if isinstance(schedulers, Mapping):
        states = _mapping(states, f'{source}: its param_schedulers')
        return {name: check_schedulers(states.get(name), each, source) for name, each in schedulers.items()}
    if not isinstance(states, Sequence) or isinstance(states, str):
        raise CheckpointError(f'{source}: its param_schedulers are {shown(states)}, expected a list')
    checked = []
    for index, each in enumerate(states):
        state = _mapping(each, f'{source}: its param_schedulers[{index}]')
        ours = schedulers[index].state_dict() if index < len(schedulers) else {}
        for key in ours.keys() & state.keys():
            if not _alike(state[key], ours[key]):
                raise CheckpointError(
                    f'{source}: its param_schedulers[{index}].{key} is {shown(state[key])}, '
                    f"expected something like this run's {shown(ours[key])}"
                )
        checked.append({key: value for key, value in state.items() if key in ours})
    return checked


def _alike(value: Any, ours: Any) -> bool:
    """Tell whether a value of a file can stand where the run has ``ours``."""
    if isinstance(ours, bool) or isinstance(value, bool):
        fits = type(value) is type(ours)
    elif type(ours) is int:
        fits = type(value) is int and abs(value) <= MAX_COUNT
    elif _is_number(ours):
        fits = _is_number(value) and math.isfinite(value)
    elif isinstance(ours, (list, tuple)):
        fits = isinstance(value, (list, tuple)) and len(value) == len(ours) and all(map(_alike, value, ours))
    elif isinstance(ours, Mapping):
        fits = isinstance(value, Mapping) and all(_is_number(number) for number in value.values())
    else:
        fits = not isinstance(ours, str) or isinstance(value, str)
    return fits


def check_optimizer(state: Any, optimizer: Optimizer, source: str) -> None:
    """Check that a saved state can be one of an optimizer, which torch itself finds out in the first step or never.

    Args:
        state: What the checkpoint holds, with the parameters numbered. One by names is left to who divides it.
        optimizer: That of the run.
        source: Where the state comes from, for messages.

    Raises:
        CheckpointError: If groups, options or the shapes of tensors do not fit.
    """
    state = _mapping(state, f'{source}: its optimizer')
    entries = _mapping(state.get('state'), f'{source}: its optimizer.state')
    _check_wrapper(state, optimizer, f'{source}: its optimizer')
    groups = state.get('param_groups')
    sizes = [len(group['params']) for group in optimizer.param_groups]
    theirs = [_group_size(group) for group in groups] if isinstance(groups, list) else None
    if theirs != sizes:
        raise CheckpointError(
            f"{source}: the groups of its optimizer have {shown_sizes(theirs)} parameters, this run's have "
            f'{shown_sizes(sizes)}'
        )
    for index, (group, ours) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        for key in ours.keys() & group.keys() - {'params'}:
            if ours[key] is not None and group[key] is not None and not _alike(_number(group[key]), _number(ours[key])):
                raise CheckpointError(
                    f'{source}: its optimizer.param_groups[{index}].{key} is {shown(group[key])}, '
                    f"expected something like this run's {shown(ours[key])}"
                )
    if any(isinstance(name, str) for group in groups for name in group['params']):
        return
    numbers = [number for group in groups for number in group['params']]
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    shapes = dict(zip(numbers, [parameter.shape for parameter in parameters], strict=True))
    for number, entry in entries.items():
        if number not in shapes:
            raise CheckpointError(
                f'{source}: its optimizer has a state of parameter {shown(number)}, which no group has'
            )
        for key, value in _mapping(entry, f'{source}: its optimizer.state[{number}]').items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != shapes[number]:
                raise CheckpointError(
                    f'{source}: its optimizer.state[{number}].{shown(key)} has the shape {tuple(value.shape)}, '
                    f'the parameter {tuple(shapes[number])}'
                )


def _check_wrapper(state: Mapping[str, Any], optimizer: Optimizer, what: str) -> None:
    """Check what mmengine's wrappers of optimizers put beside the optimizer's own state."""
    scaler = _mapping(state.get('loss_scaler') or {}, f'{what}.loss_scaler')
    for key, kinds in _SCALER.items() if scaler else ():
        value = scaler.get(key)
        if type(value) not in kinds or not 0 <= value < math.inf:
            raise CheckpointError(f'{what}.loss_scaler.{key} is {shown(value)}, expected a number')
    if state.get('base_param_settings') is None:
        return
    base = _mapping(state['base_param_settings'], f'{what}.base_param_settings')
    for key, ours in optimizer.defaults.items():
        value = _number(base.get(key))
        looked_at = key == 'lr' or (value is not None and ours is not None)
        if looked_at and not _alike(value, _number(ours)):
            raise CheckpointError(f'{what}.base_param_settings.{key} is {shown(value)}, expected {shown(ours)}')


def _group_size(group: Any) -> int | None:
    numbers = group.get('params') if isinstance(group, Mapping) else None
    usable = isinstance(numbers, list) and all(type(number) in (int, str) for number in numbers)
    return len(numbers) if usable else None


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def shown_sizes(sizes: list[int | None] | None) -> str:
    """Return the sizes of groups for a message."""
    return 'no readable list of' if sizes is None or None in sizes else '+'.join(map(str, sizes[:20]))


def check_random_state(state: Any) -> None:
    """Check the parts of a random state that numpy would take as an index into memory.

    Args:
        state: As :func:`mila_mm.engine.random_state.capture_random_state` returns it.

    Raises:
        ValueError: If the position or the length of numpy's state cannot be.
    """
    name, words, position, has_gauss, gauss = state['numpy']
    if name != 'MT19937' or not isinstance(words, Tensor) or words.shape != (624,):
        raise ValueError("numpy's state is not one of 624 words")
    if type(position) is not int or not 0 <= position <= 624 or has_gauss not in (0, 1) or not _is_number(gauss):
        raise ValueError(f"numpy's position is {shown(position)}, expected 0 to 624")
    if words.dtype != torch.int64:
        raise ValueError(f"numpy's words are {words.dtype}, expected int64")
