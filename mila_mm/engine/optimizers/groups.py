"""Groups of parameters: those of equal settings are one, so that an optimizer updates them together.

With any ``paramwise_cfg`` mmengine's constructor makes a group of every parameter, 479 for Mask R-CNN with MILA-T, of
two different settings. torch's optimizers batch their work within a group only.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import BaseOptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from mila_mm.engine.config.build_errors import did_you_mean
from mila_mm.errors import UserError

_PER_PARAMETER = ('params', 'param_names')  # the entries of a group that are no settings
_IMPLEMENTATION = ('fused', 'foreach', 'capturable')  # how a step is computed, and not what
_FUSABLE = {'Adam': torch.optim.Adam, 'AdamW': torch.optim.AdamW}


@dataclass(frozen=True)
class Grouping:
    """How the groups of a constructor became those of its optimizer.

    Attributes:
        sizes: Parameters in each group of the constructor.
        members: For each group of the optimizer the indices of those that it is made of.
    """

    sizes: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]

    def applies_to(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether saved groups are cut as the constructor cuts them, and not as the optimizer does."""
        merged = len(self.members) < len(self.sizes)
        return merged and tuple(len(group['params']) for group in groups) == self.sizes

    def merge(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Join groups of the constructor; each keeps the settings of its first member."""
        joined = []
        for indices in self.members:
            first = groups[indices[0]]
            lists = {key: [x for i in indices for x in groups[i][key]] for key in _PER_PARAMETER if key in first}
            joined.append({**first, **lists})
        return joined

    def pick(self, values: Sequence[Any]) -> list[Any]:
        """One of the constructor's values for each group of the optimizer, and those beyond the groups."""
        return [*(values[indices[0]] for indices in self.members), *values[len(self.sizes) :]]


def merge_groups(wrapper: BaseOptimWrapper) -> dict[str | None, Grouping]:
    """Merge the groups of equal settings, whatever constructor made them, before the first step.

    Args:
        wrapper: The optimizer in its wrapper, or several (:class:`mmengine.optim.OptimWrapperDict`).

    Returns:
        What was done, for :func:`regroup`; by the wrapper's name, None where there is one alone.
    """
    return {name: _merge(each.optimizer) for name, each in _wrappers(wrapper)}


def _wrappers(wrapper: BaseOptimWrapper) -> list[tuple[str | None, BaseOptimWrapper]]:
    return list(wrapper.items()) if isinstance(wrapper, OptimWrapperDict) else [(None, wrapper)]


def _merge(optimizer: Optimizer) -> Grouping:
    groups = optimizer.param_groups
    kinds: list[tuple[dict[str, Any], list[int]]] = []
    for i, group in enumerate(groups):
        settings = {key: value for key, value in group.items() if key not in _PER_PARAMETER}
        for known, members in kinds:
            if _equal(known, settings):
                members.append(i)
                break
        else:
            kinds.append((settings, [i]))
    sizes = tuple(len(group['params']) for group in groups)
    grouping = Grouping(sizes, tuple(tuple(members) for _, members in kinds))
    if len(kinds) < len(groups):
        optimizer.param_groups = grouping.merge(groups)
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            # It holds an optimizer of its own for the share of its rank.
            optimizer._clear_cache()
            optimizer._init_local_optimizer()
    return grouping


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    # A learning rate may be a tensor, which the groups that share it change together.
    return a.keys() == b.keys() and all(
        a[key] is b[key] if isinstance(a[key], Tensor) or isinstance(b[key], Tensor) else a[key] == b[key] for key in a
    )


def regroup(
    checkpoint: dict[str, Any], wrapper: BaseOptimWrapper, groupings: Mapping[str | None, Grouping]
) -> dict[str, Any]:
    """Fit the optimizer and the schedulers of a checkpoint to merged groups; state is mapped by parameter.

    Checkpoints of mmengine's own runner, and those from before groups were merged, hold the constructor's groups. How
    steps are computed (``fused``, ``foreach``) is the running optimizer's choice and not the checkpoint's.

    Args:
        checkpoint: A checkpoint; left as it is where nothing is to be done.
        wrapper: The optimizer that will take it.
        groupings: What :func:`merge_groups` returned.

    Returns:
        The checkpoint, its entries ``optimizer`` and ``param_schedulers`` replaced where needed.
    """
    changed = dict(checkpoint)
    for name, each in _wrappers(wrapper):
        saved = checkpoint.get('optimizer')
        saved = saved.get(name) if name is not None and isinstance(saved, Mapping) else saved
        if not isinstance(saved, Mapping) or not saved.get('param_groups'):
            continue
        grouping, schedulers = groupings[name], checkpoint.get('param_schedulers')
        if grouping.applies_to(saved['param_groups']):
            _warn_of_differences(saved['param_groups'], grouping)
            saved = _renumbered({**saved, 'param_groups': grouping.merge(saved['param_groups'])})
            if name is None and isinstance(schedulers, list):
                changed['param_schedulers'] = [_scheduler(state, grouping) for state in schedulers]
            elif isinstance(schedulers, Mapping) and isinstance(schedulers.get(name), list):
                own = {name: [_scheduler(state, grouping) for state in schedulers[name]]}
                changed['param_schedulers'] = {**changed['param_schedulers'], **own}
        saved = {**saved, 'param_groups': _as_running(saved['param_groups'], each.optimizer.param_groups)}
        changed['optimizer'] = saved if name is None else {**changed['optimizer'], name: saved}
    return changed


def _warn_of_differences(groups: Sequence[Mapping[str, Any]], grouping: Grouping) -> None:
    """Say so where the checkpoint's settings tell parameters apart that the config treats alike."""
    for key in ('initial_lr', 'weight_decay'):
        found = [{groups[i].get(key) for i in members} for members in grouping.members]
        if differing := next((sorted(map(str, values)) for values in found if len(values) > 1), None):
            print_log(
                f'--resume: the checkpoint has {key} {" and ".join(differing)} for parameters that this config treats '
                'alike: all take the first. Resume with the config of the checkpoint to keep them apart.',
                logger='current',
                level=logging.WARNING,
            )


def _renumbered(state: dict[str, Any]) -> dict[str, Any]:
    """Parameters numbered through the groups again, as torch's optimizers do; names (of sharded ones) stay."""
    ids = [i for group in state['param_groups'] for i in group['params']]
    if not all(isinstance(i, int) for i in ids):
        return state
    place = {old: new for new, old in enumerate(ids)}
    groups = [{**group, 'params': [place[i] for i in group['params']]} for group in state['param_groups']]
    entries = {place.get(key, key): value for key, value in state['state'].items()}
    return {**state, 'param_groups': groups, 'state': entries}


def _scheduler(state: Mapping[str, Any], grouping: Grouping) -> dict[str, Any]:
    """A scheduler's state with one value for each merged group: all its lists that have one for each old group."""
    # mmengine's wrapper lists a group of its own behind the optimizer's, for the base learning rate.
    lengths = (len(grouping.sizes), len(grouping.sizes) + 1)
    return {
        key: grouping.pick(value) if _numbers(value) and len(value) in lengths else value
        for key, value in state.items()
    }


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, (int, float)) for x in value)


def _as_running(saved: Sequence[Mapping[str, Any]], running: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    choice = {key: running[0][key] for key in _IMPLEMENTATION if key in running[0]}
    return [{**group, **choice} for group in saved]


def check_kind(optimizer_cfg: dict[str, Any]) -> None:
    """Check that there is an optimizer of the config's type; mmengine's own failure does not say which is absent.

    Raises:
        UserError: If there is none.
    """
    kind = optimizer_cfg.get('type')
    with OPTIMIZERS.switch_scope_and_registry(None) as registry:
        if isinstance(kind, str) and registry.get(kind) is None:
            known = {*registry.module_dict, *OPTIMIZERS.module_dict}
            raise UserError(f'optim_wrapper.optimizer: there is no {kind}{did_you_mean(kind, known)}')


def use_fused(optimizer_cfg: dict[str, Any], model: nn.Module) -> None:
    """Let Adam and AdamW of a model on a GPU update all parameters of a group in one kernel, unless told otherwise.

    Args:
        optimizer_cfg: Config of the optimizer, to change.
        model: The model, where it will train.
    """
    kind = optimizer_cfg.get('type')
    known = kind in _FUSABLE.values() or kind in _FUSABLE
    told = any(key in optimizer_cfg for key in (*_IMPLEMENTATION, 'differentiable'))
    if not known or told or get_device() != 'cuda':
        return
    if all(p.is_cuda and p.is_floating_point() and type(p) is nn.Parameter for p in model.parameters()):
        optimizer_cfg['fused'] = True
