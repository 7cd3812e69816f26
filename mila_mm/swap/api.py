"""Swap MILA into a config: the function behind ``tools/swap_backbone.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from mmengine.config import Config

from mila_mm.arch import resolve_arch
from mila_mm.errors import UserError
from mila_mm.swap import clean
from mila_mm.swap import recipe as recipes
from mila_mm.swap.job import Job, plain, value_at
from mila_mm.swap.light import build
from mila_mm.swap.probe import STRIDES, choose_stages, in_channels_of, note_strides, probe_backbone
from mila_mm.swap.result import Draft, Maps, SwapRefused, SwapResult
from mila_mm.swap.source import read_source
from mila_mm.swap.trial import rewired
from mila_mm.weights.source.published import SCHEME, find

_BATCH_NORMS = ('BN', 'SyncBN', 'MMSyncBN')


def swap_backbone(
    config: str | FilePath | Config,
    arch: str | Mapping[str, Any] = 'tiny',
    weights: str | None = None,
    recipe: str = 'keep',
    drop_path_rate: float | None = None,
) -> Config:
    """Put MILA in place of the backbone of any mmdet or mmseg config.

    Args:
        config: Path, ``mmdet::FOLDER/FILE``, ``mmseg::FOLDER/FILE``, or a config in memory, which is not changed.
        arch: As :class:`mila_mm.MILA` takes it. Defaults to 'tiny'.
        weights: Pretrained weights: ``mila://tiny-in1k`` or a file. Defaults to None.
        recipe: 'keep' the optimizer, or 'mila': MILA's AdamW in place of SGD. Defaults to 'keep'.
        drop_path_rate: Stochastic depth. Defaults to that of the old backbone or of MILA's recipes.

    Returns:
        The config with MILA, whose model was built and run.

    Raises:
        UserError: If the config cannot be read, an argument is wrong, the swap cannot work
            (:class:`mila_mm.swap.SwapRefused`) or could not be made or checked (``SwapFailed``); the message is the
            reason.

    Example:
        >>> from mila_mm import swap_backbone
        >>> swap_backbone('mmdet::retinanet/retinanet_r50_fpn_1x_coco').model.neck.in_channels
        [128, 256, 512]
    """
    return plan_swap(config, arch, weights, recipe, drop_path_rate).config


def plan_swap(
    config: str | FilePath | Config,
    arch: str | Mapping[str, Any] = 'tiny',
    weights: str | None = None,
    recipe: str = 'keep',
    drop_path_rate: float | None = None,
    whole_models: bool = True,
) -> SwapResult:
    """Swap, and tell what was changed and what could not be known.

    Args:
        config: As for :func:`swap_backbone`, like the other arguments.
        whole_models: Whether to build and run the whole model also where backbone and neck show that the heads get the
            same as before. Without it a sweep over many configs takes a fraction of the time. Defaults to True.

    Returns:
        The config with its changes.

    Raises:
        UserError: As there.
    """
    _check_arguments(arch, weights, recipe, drop_path_rate)
    job = _prepare(config, arch, weights, recipe, drop_path_rate, whole_models)
    draft, new_maps, checked, trial = rewired(job)
    holder = job.source.holder
    clean.drop_old_weights(draft, holder)
    clean.normalise(draft, holder)
    clean.drop_imports(draft, job.source.failed_imports, job.model['backbone'], job.source.scope)
    clean.note_lost_options(draft, job.model['backbone'])
    replaced = recipe == 'mila' and recipes.apply_mila_recipe(draft, job.source.scope)
    new_names = [name for name, _ in build(job.backbone, job.source.scope, 'meta').named_parameters()]
    recipes.adapt_optimizer(draft, holder, job.probe.parameters, new_names, trial.parameters if trial else ())
    if replaced:
        recipes.free_norms(draft, holder, new_names)
    _note_rest(draft, job, new_maps, weights, recipe)
    name = arch if isinstance(arch, str) else 'of a custom size'
    return SwapResult(
        Config(draft.config),
        job.source.name,
        job.original,
        draft.merged(),
        draft.unknowns,
        job.probe.maps,
        new_maps,
        checked,
        f'MILA {name} in place of {job.model["backbone"]["type"]}',
    )


def _check_arguments(arch: Any, weights: str | None, recipe: str, drop_path_rate: float | None) -> None:
    try:
        resolve_arch(arch)
    except ValueError as error:
        raise UserError(f'--arch: {error}') from error
    if weights is not None and weights.startswith(SCHEME):
        published = find(weights).arch
        if published != arch:
            raise UserError(f'--weights {weights}: are those of arch {published!r}, got --arch {arch!r}')
    elif weights is not None and '://' not in weights and not FilePath(weights).expanduser().is_file():
        raise UserError(f'--weights {weights}: file does not exist (looked in {FilePath.cwd()})')
    if recipe not in recipes.RECIPES:
        raise UserError(f'--recipe: expected one of {", ".join(recipes.RECIPES)}, got {recipe!r}')
    if drop_path_rate is not None and not 0 <= drop_path_rate < 1:
        raise UserError(f'--drop-path-rate: expected a number in [0, 1), got {drop_path_rate!r}')


def _prepare(
    config: Any, arch: Any, weights: str | None, recipe: str, drop_path_rate: float | None, whole_models: bool
) -> Job:
    """Read the config and settle the new backbone's arguments."""
    source = read_source(config)
    original = plain(source.config._cfg_dict.to_dict())
    holder = value_at(original, source.holder)
    old = holder['backbone']
    if str(old['type']).rpartition('.')[2] == 'MILA':
        raise SwapRefused('the backbone of the config is a MILA already; change its arch with --cfg-options')
    probe = probe_backbone(holder, source.scope)
    stages = choose_stages(probe.maps, source.scope)
    notes = []
    if drop_path_rate is None:
        drop_path_rate, where = recipes.drop_path_rate(recipe, source.scope, original, old, arch)
        notes.append(f'drop_path_rate={drop_path_rate:g} is {where}')
    arch = dict(arch) if isinstance(arch, Mapping) else arch
    backbone: dict[str, Any] = dict(type='mila_mm.MILA', arch=arch)
    if in_channels_of(old) != 3:
        backbone['in_channels'] = in_channels_of(old)
        notes.append(f'the image has {in_channels_of(old)} channels; published weights are for 3')
    backbone |= dict(out_indices=stages, drop_path_rate=drop_path_rate)
    norm = old.get('norm_cfg')
    if isinstance(norm, dict) and norm.get('type') in _BATCH_NORMS[1:]:
        backbone['norm_cfg'] = dict(type=norm['type'])
    if old.get('with_cp'):
        backbone['with_cp'] = True
    if probe.frozen:
        backbone |= dict(frozen_stages=stages[-1] + 1, norm_eval=True)
        notes.append('the old backbone did not learn at all, so MILA does not either; it needs weights for that')
    elif old.get('frozen_stages', -1) >= 0:
        notes.append('the old backbone kept its first stages frozen; MILA trains whole, as its published detectors do')
    if weights is not None:
        # a path would be looked for from where training starts
        where = weights if '://' in weights else str(FilePath(weights).expanduser().resolve())
        backbone['init_cfg'] = dict(type='Pretrained', checkpoint=where)
    return Job(source, original, probe, stages, backbone, tuple(notes), whole_models)


def _note_rest(draft: Draft, job: Job, new: Maps, weights: str | None, recipe: str) -> None:
    kept = [job.stages.index(i) for i in draft.get((*job.source.holder, 'backbone')).get('out_indices', job.stages)]
    notes = list(job.notes) + ([job.probe.unknown] if job.probe.unknown else [])
    notes += note_strides([job.probe.maps.strides[i] for i in kept], new.strides)
    deepest = STRIDES[job.stages[-1]]
    if deepest < STRIDES[-1] and job.source.scope == 'mmseg':
        notes.append(
            f'MILA goes no deeper than 1/{deepest}, as the old backbone; if that was dilated, the '
            'stages that are left out (out_indices) have its depth'
        )
    notes += [f'{".".join(map(str, path))} is another model and keeps its backbone' for path in job.source.others]
    if weights is None:
        notes.append('no weights given: the backbone starts from random ones (--weights mila://tiny-in1k)')
    optimizer = (draft.config.get('optim_wrapper') or {}).get('optimizer') or {}
    if recipe == 'keep' and recipes.name_of(optimizer.get('type')) == 'SGD':
        notes.append(f'the optimizer stays SGD, lr={optimizer.get("lr")}; MILA was trained by AdamW (--recipe mila)')
    draft.unknowns.extend(notes)
