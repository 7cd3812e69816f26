"""The optimizer of a swapped config: entries that named parts of the old backbone, and MILA's own recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from mila_mm.arch import resolve_arch
from mila_mm.swap.result import Draft, Path

RECIPES = ('keep', 'mila')

# The batch that the published learning rates are for, and the rates and the warm-up; by library.
_BATCH = 16
_LR = {'mmdet': 1e-4, 'mmseg': 6e-5}
_WEIGHT_DECAY = {'mmdet': 0.05, 'mmseg': 0.01}
_WARMUP = {
    'mmdet': dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    'mmseg': dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
}
_MOST_NAMES = 4
# Entries of schedules that are rates, not parts of them.
_RATES = ('eta_min', 'eta_max', 'min_value')
_KNOWN_CONSTRUCTORS = ('DefaultOptimWrapperConstructor', 'LayerDecayOptimWrapperConstructor')


def drop_path_rate(
    recipe: str, scope: str, config: dict[str, Any], old: dict[str, Any], arch: Any
) -> tuple[float, str]:
    """Choose the stochastic depth.

    Args:
        recipe: 'keep' or 'mila'.
        scope: 'mmdet' or 'mmseg'.

    Returns:
        The rate and where it comes from.
    """
    rate = old.get('drop_path_rate')
    if recipe == 'keep' and isinstance(rate, (int, float)) and not isinstance(rate, bool):
        return float(rate), "the old backbone's"
    if scope == 'mmseg':
        deep = sum(resolve_arch(arch).depths)
        wide = resolve_arch(arch).embed_dim
        return (0.5 if wide >= 96 else 0.3 if deep > 20 else 0.2), "this package's for segmentors of that size"
    epochs = (config.get('train_cfg') or {}).get('max_epochs')
    long = isinstance(epochs, int) and epochs > 12
    return (0.3, 'the published one beyond 12 epochs') if long else (0.1, 'the published one up to 12 epochs')


def adapt_optimizer(draft: Draft, holder: Path, old: Sequence[str], new: Sequence[str], model: Sequence[str]) -> None:
    """Take out what the optimizer's config says of the old backbone's parameters, and say it of MILA's.

    Args:
        old: Names of the old backbone's parameters; empty where not known.
        new: Names of MILA's.
        model: Names of all parameters of the new model; empty where not known.
    """
    path: Path = ('optim_wrapper', 'paramwise_cfg')
    paramwise = draft.get(path)
    if not isinstance(paramwise, dict):
        return
    if 'num_layers' in paramwise and ('decay_rate' in paramwise or 'layer_decay_rate' in paramwise):
        _layer_decay(draft, holder, paramwise)
        paramwise = draft.get(path)
    keys = paramwise.get('custom_keys')
    if not isinstance(keys, dict) or not old:
        return
    prefix = '.'.join(map(str, (*holder[1:], 'backbone')))
    old_names, new_names = ([f'{prefix}.{name}' for name in names] for names in (old, new))
    rest = [name for name in model if not name.startswith('backbone.')]
    everything = [*new_names, *rest]
    # of a model inside of a model the other parts' names are not known: there only what named the old backbone is dead
    all_known = bool(model) and len(holder) == 1
    dead = [k for k in keys if not any(k in n for n in everything) and (all_known or any(k in n for n in old_names))]
    dead += [k for k in keys if k.startswith(f'{prefix}.') and k not in dead and not any(k in n for n in new_names)]
    if not dead:
        return
    alive = {k: copy.deepcopy(v) for k, v in keys.items() if k not in dead}
    norms = next((keys[k] for k in dead if 'norm' in k), None)
    if norms is not None:
        alive |= {k: copy.deepcopy(norms) for k in _norm_keys(new_names, alive)}
    names = ', '.join(map(repr, dead[:_MOST_NAMES])) + (
        f' and {len(dead) - _MOST_NAMES} more' if len(dead) > _MOST_NAMES else ''
    )
    draft.unknowns.append(f'rules for parameters of the old backbone are gone (paramwise_cfg.custom_keys): {names}')
    draft.put(
        (*path, 'custom_keys'),
        alive,
        f'{len(dead)} of {len(keys)} entries named parameters of the old backbone'
        + ('' if norms is None else "; MILA's norms take the place of its norms"),
    )


def _norm_keys(names: Sequence[str], alive: dict[str, Any]) -> list[str]:
    """Return keys for the norms of MILA that a more general entry would hide from a plain 'norm'."""
    general = max((len(k) for k in alive if any(k in n for n in names) and 'norm' not in k), default=0)
    if general < len('norm'):
        return [] if 'norm' in alive else ['norm']
    found: dict[str, None] = {}
    for name in names:
        if 'norm' not in name:
            continue
        key = name[: name.index('norm') + len('norm')]
        if not any('norm' in k and k in name and len(k) > general for k in alive):
            found[key] = None
    return list(found)


def _layer_decay(draft: Draft, holder: Path, paramwise: dict[str, Any]) -> None:
    """Layer-wise learning rates: the libraries' constructors know the layers of their own backbones only."""
    rate = paramwise.get('layer_decay_rate', paramwise.get('decay_rate'))
    path: Path = ('optim_wrapper',)
    why = 'the old constructor knows the layers of the old backbone only'
    rest = {
        k: v for k, v in paramwise.items() if k not in ('num_layers', 'decay_rate', 'decay_type', 'layer_decay_rate')
    }
    if len(holder) == 1:
        rest |= {'layer_decay_rate': rate}
        draft.put((*path, 'constructor'), 'mila_mm.LayerDecayOptimWrapperConstructor', why)
        outcome = "the same rate per layer, over MILA's layers"
    else:
        outcome = 'one rate for all layers: MILA is inside of another model'
        draft.put((*path, 'constructor'), 'DefaultOptimWrapperConstructor', why)
    rest.setdefault('custom_keys', {'norm': dict(decay_mult=0.0)})
    draft.put((*path, 'paramwise_cfg'), rest, outcome)
    draft.unknowns.append(f'layer-wise learning rates: a decay of {rate} was tuned for the old depth')


def apply_mila_recipe(draft: Draft, scope: str) -> bool:
    """Put MILA's AdamW recipe in place of SGD.

    The rate is scaled linearly to the batch that the config names. Wrappers (AMP), the rules of ``paramwise_cfg`` and
    the schedule stay; rates that it names are scaled as the optimizer's, and a warm-up is put in front where there is
    none.

    Args:
        draft: Config to change; comes before :func:`adapt_optimizer`, which may have to change the constructor.
        scope: 'mmdet' or 'mmseg'.

    Returns:
        Whether the optimizer was replaced.
    """
    wrapper = draft.config.get('optim_wrapper')
    if not isinstance(wrapper, dict) or not isinstance(wrapper.get('optimizer'), dict):
        draft.unknowns.append('recipe: the config has no optim_wrapper with an optimizer, so there is none to replace')
        return False
    kind, old_lr = name_of(wrapper['optimizer'].get('type')), wrapper['optimizer'].get('lr')
    if kind != 'SGD':
        draft.unknowns.append(
            f'recipe: the config trains by {kind} already, not by SGD, with rates of its own; they stay'
        )
        return False
    batch = (draft.config.get('auto_scale_lr') or {}).get('base_batch_size')
    if not isinstance(batch, int):
        draft.unknowns.append(
            f'recipe: the config names no total batch (auto_scale_lr.base_batch_size); the rate is for {_BATCH} images'
        )
        batch = _BATCH
    lr = float(f'{_LR[scope] * batch / _BATCH:.3g}')
    scaled = '' if batch == _BATCH else f', scaled from {_BATCH} images to {batch}'
    optimizer = dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=_WEIGHT_DECAY[scope])
    draft.put(('optim_wrapper', 'optimizer'), optimizer, f"MILA's recipe{scaled}")
    _no_decay_on_norms(draft)
    counts = wrapper.get('accumulative_counts')
    if isinstance(counts, int) and counts > 1:
        draft.unknowns.append(
            f'recipe: {counts} batches are accumulated for a step; lr={lr:g} is for {batch} images a '
            f'step, all {counts} batches together (tools/train.py --auto-scale-lr counts them)'
        )
    if wrapper.get('clip_grad') is not None:
        draft.put(('optim_wrapper', 'clip_grad'), None, "MILA's recipe does not clip")
    _reschedule(draft, scope, lr / old_lr if isinstance(old_lr, (int, float)) and old_lr else 1.0)
    return True


def name_of(kind: Any) -> str:
    """Return the name of a class that a config gives as a string, with or without its module, or as itself."""
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def _no_decay_on_norms(draft: Draft) -> None:
    """Add to the config's own rules for parameters that norms do not decay; by kind, and MILA's by name."""
    path: Path = ('optim_wrapper', 'paramwise_cfg')
    rules = draft.get(path)
    rules = copy.deepcopy(rules) if isinstance(rules, dict) else {}
    keys = rules.get('custom_keys') or {}
    keys = {k: v for k, v in keys.items() if k != 'norm'} | {'norm': {**keys.get('norm', {}), 'decay_mult': 0.0}}
    draft.put(path, rules | {'norm_decay_mult': 0.0, 'custom_keys': keys}, 'no weight decay on norms')
    constructor = draft.config['optim_wrapper'].get('constructor')
    if constructor is not None and name_of(constructor) not in _KNOWN_CONSTRUCTORS and 'num_layers' not in rules:
        draft.unknowns.append(
            f'recipe: whether optim_wrapper.constructor, {name_of(constructor)}, reads '
            'norm_decay_mult and custom_keys is not known'
        )


def free_norms(draft: Draft, holder: Path, names: Sequence[str]) -> None:
    """Keep MILA's norms from decaying also where an entry for more than norms would come before 'norm'.

    Args:
        draft: Config to change, after :func:`adapt_optimizer`.
        names: Names of MILA's parameters.
    """
    path: Path = ('optim_wrapper', 'paramwise_cfg', 'custom_keys')
    keys = draft.get(path) or {}
    names = [f'{".".join(map(str, (*holder[1:], "backbone")))}.{name}' for name in names]
    hidden = {}
    for norm in _norm_keys(names, keys):
        general = max((k for k in keys if k in norm), key=len, default='')
        hidden[norm] = {**copy.deepcopy(keys.get(general, {})), 'decay_mult': 0.0}
    if hidden:
        draft.put(path, {**keys, **hidden}, "no weight decay on MILA's norms, which a more general entry would hide")
    others = [
        k
        for k, v in keys.items()
        if 'norm' not in k and v.get('decay_mult', 1) and not any(k in name for name in names)
    ]
    if others:
        draft.unknowns.append(f'recipe: norms under {", ".join(map(repr, others))} (custom_keys) decay as these say')


def _reschedule(draft: Draft, scope: str, scale: float) -> None:
    """Put a warm-up in front where there is none, and scale rates that the schedule names, as the optimizer's was."""
    schedule = draft.config.get('param_scheduler')
    if schedule is None:
        draft.unknowns.append('recipe: the config has no param_scheduler, so there is no warm-up either')
        return
    steps = copy.deepcopy(list(schedule) if isinstance(schedule, (list, tuple)) else [schedule])
    of_rates = [
        step
        for step in steps
        if not name_of(step.get('type')).endswith('Momentum') and step.get('param_name', 'lr') == 'lr'
    ]
    scaled = []
    for step in of_rates:
        for key in _RATES:
            if isinstance(step.get(key), (int, float)) and step[key]:
                step[key] = float(f'{step[key] * scale:.3g}')
                scaled.append(key)
    why = [f'{" and ".join(dict.fromkeys(scaled))} scaled as the rate was'] if scaled else []
    if any(_is_warm_up(step) for step in of_rates):
        draft.put(('param_scheduler',), steps, '; '.join(why))
        return
    warmup = dict(_WARMUP[scope])
    for step in of_rates:
        # by iterations the schedule goes on where the warm-up ends; by epochs the two overlap, as in mmdet
        if not step.get('by_epoch', True) and not step.get('begin', 0) and step.get('end', 0) > warmup['end']:
            step['begin'] = warmup['end']
    why.insert(0, f'warm-up of {warmup["end"]} iterations in front')
    draft.put(('param_scheduler',), [warmup, *steps], '; '.join(why))


def _is_warm_up(step: dict[str, Any]) -> bool:
    """Tell whether a schedule of rates starts low and rises."""
    kind = name_of(step.get('type'))
    if step.get('begin', 0):
        return False
    if kind == 'LinearLR':
        start = step.get('start_factor', 1 / 3)
        return start < 1 and step.get('end_factor', 1.0) >= start
    if kind == 'ConstantLR':
        return step.get('factor', 1 / 3) < 1
    return kind == 'OneCycleLR' or 'Warmup' in kind
