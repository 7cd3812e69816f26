"""What the old backbone leaves behind in a config: its weights, its normalisation, its options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import mmengine.registry
from mmengine.registry import Registry

from mila_mm.swap.result import Draft, Path

# Of ImageNet, RGB, 0 to 255: what MILA's published weights were trained with.
MEAN = [123.675, 116.28, 103.53]
STD = [58.395, 57.12, 57.375]

# Options of other backbones for which MILA has no counterpart, and which change what a model is.
_NO_COUNTERPART = ('dcn', 'plugins', 'gen_attention', 'sac')


# Of all that mmengine has, those whose types stand in configs.
_REGISTRIES = (
    'MODELS', 'DATASETS', 'TRANSFORMS', 'HOOKS', 'METRICS', 'EVALUATOR', 'OPTIMIZERS', 'OPTIM_WRAPPERS', 'VISUALIZERS',
    'OPTIM_WRAPPER_CONSTRUCTORS', 'PARAM_SCHEDULERS', 'DATA_SAMPLERS', 'LOOPS', 'VISBACKENDS', 'LOG_PROCESSORS',
    'TASK_UTILS', 'WEIGHT_INITIALIZERS', 'MODEL_WRAPPERS', 'RUNNERS',
)  # fmt: skip


def drop_old_weights(draft: Draft, holder: Path) -> None:
    """Take out what would load weights of the old backbone."""
    for depth in range(1, len(holder) + 1):
        part = holder[:depth]
        if draft.get((*part, 'pretrained')) is not None:
            draft.put((*part, 'pretrained'), None, 'weights of the old backbone')
        init_cfg = draft.get((*part, 'init_cfg'))
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            draft.put((*part, 'init_cfg'), None, 'weights of the whole old model')
            draft.unknowns.append(
                f'{".".join(map(str, part))}.init_cfg named weights of the whole old model '
                f'({init_cfg.get("checkpoint")}): they do not fit any more'
            )
    if draft.config.get('load_from'):
        draft.unknowns.append(
            f'load_from named weights of the old model ({draft.config["load_from"]}): they do not '
            'fit any more, so heads start fresh too'
        )
        draft.put(('load_from',), None, 'weights of the old model')
    if draft.config.get('resume'):
        draft.put(('resume',), False, 'would go on from a checkpoint of the old model')
    if draft.config.get('work_dir'):
        draft.unknowns.append(
            f'work_dir is {draft.config["work_dir"]}, that of the original: checkpoints of the old '
            'model may lie there, and new ones replace them; --work-dir names another'
        )


def drop_imports(draft: Draft, failed: dict[str, str], backbone: dict[str, Any], scope: str) -> None:
    """Take out ``custom_imports`` that cannot be imported here where only the old backbone needed them.

    They may be there where the config will run, and register what a name in it does not show: so they stay, and that
    is said, unless the old backbone's type was unknown here and every other type is known.

    Args:
        draft: Config to change, with MILA in it.
        failed: Module to the reason.
        backbone: Config of the old backbone.
        scope: 'mmdet' or 'mmseg'.
    """
    imports = (draft.config.get('custom_imports') or {}).get('imports') or []
    imports = [imports] if isinstance(imports, str) else list(imports)
    rest = {key: value for key, value in draft.config.items() if key != 'custom_imports'}
    used = set(_scopes(rest))
    only_backbone = not _is_known(backbone.get('type'), scope) and all(_is_known(kind, scope) for kind in _types(rest))
    dead = [module for module in imports if module in failed and module.partition('.')[0] not in used]
    dead = dead if only_backbone else []
    for module in sorted(set(failed) - set(dead)):
        draft.unknowns.append(
            f'custom_imports: {module} cannot be imported here ({failed[module]}); it stays, as the rest of the config '
            'may need it, and must be there where the config runs'
        )
    if dead:
        kept = [module for module in imports if module not in dead]
        why = '; '.join(f'{module} cannot be imported here ({failed[module]})' for module in dead)
        draft.put(('custom_imports', 'imports'), kept, f'{why}, and only the old backbone named what no registry knows')


def _is_known(kind: Any, scope: str) -> bool:
    """Tell whether any registry knows a type."""
    # nms and its like are functions of mmcv's
    if not isinstance(kind, str) or kind.islower():
        return True
    for name in _REGISTRIES:
        registry = getattr(mmengine.registry, name)
        if isinstance(registry, Registry):
            with registry.switch_scope_and_registry(scope) as scoped, suppress(KeyError, ImportError):
                if scoped.get(kind) is not None:
                    return True
    return False


def _types(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        if 'type' in node:
            yield node['type']
        for value in node.values():
            yield from _types(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _types(value)


def _scopes(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        kind = node.get('type')
        if isinstance(kind, str) and '.' in kind:
            yield kind.partition('.')[0]
        if isinstance(node.get('_scope_'), str):
            yield node['_scope_']
        for value in node.values():
            yield from _scopes(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _scopes(value)


def normalise(draft: Draft, holder: Path) -> None:
    """Let the data preprocessor normalise images as MILA's weights expect."""
    why = 'as MILA was trained on ImageNet'
    paths = _preprocessors(draft, holder)
    if _normalised_before(draft, paths):
        return
    for path in paths:
        node = draft.get(path)
        if len(node.get('mean') or MEAN) != len(MEAN):
            draft.unknowns.append(f'{".".join(map(str, path))}: normalises {len(node["mean"])} channels; left alone')
            continue
        if _floats(node.get('mean')) != MEAN or _floats(node.get('std')) != STD:
            draft.put((*path, 'mean'), list(MEAN), why)
            draft.put((*path, 'std'), list(STD), why)
        if node.get('rgb_to_bgr'):
            # images are loaded as RGB, which MILA takes
            draft.put((*path, 'rgb_to_bgr'), False, why)
        elif not node.get('bgr_to_rgb'):
            draft.put((*path, 'bgr_to_rgb'), True, why)


def _normalised_before(draft: Draft, preprocessors: Sequence[Path]) -> bool:
    """Tell whether a transform normalises the images before the data preprocessor sees them, and say so."""
    loaders = [draft.config.get(f'{part}_dataloader') for part in ('train', 'val', 'test')]
    found = list(_normalisations(loaders))
    if not found:
        return False
    said = ', '.join(f'{key}={found[0][key]}' for key in ('mean', 'std', 'to_rgb') if key in found[0])
    means = [draft.get((*path, 'mean')) for path in preprocessors]
    twice = next((f'; the data preprocessor does it again (mean={mean})' for mean in means if mean is not None), '')
    draft.unknowns.append(
        f'images are normalised in the pipeline (Normalize: {said}){twice}; that stays as it was. '
        f"MILA's weights expect RGB, mean={MEAN}, std={STD}, once"
    )
    return True


def _normalisations(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the transforms that normalise, inside of wrapped datasets and of other transforms too."""
    if isinstance(node, dict):
        kind = node.get('type')
        if str(getattr(kind, '__name__', kind)).rpartition('.')[2] == 'Normalize':
            yield node
        for value in node.values():
            yield from _normalisations(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _normalisations(value)


def _floats(values: Sequence[float] | None) -> list[float]:
    return [round(float(v), 3) for v in values or ()]


def _preprocessors(draft: Draft, holder: Path) -> list[Path]:
    """Return the paths of the data preprocessors that images pass on their way to the backbone."""
    # mmengine's runner gives the one at the top of a config to a model that names none
    at_top = 'data_preprocessor' not in draft.get(holder[:1]) and isinstance(draft.get(('data_preprocessor',)), dict)
    found: list[Path] = [('data_preprocessor',)] if at_top else []
    for depth in range(1, len(holder) + 1):
        path: Path = (*holder[:depth], 'data_preprocessor')
        while isinstance(draft.get((*path, 'data_preprocessor')), dict):
            path = (*path, 'data_preprocessor')
        if isinstance(draft.get(path), dict):
            found.append(path)
    # An outer one that has no mean hands on to an inner one; a single one without a mean normalises by MILA's now.
    with_mean = [path for path in found if draft.get(path).get('mean') is not None]
    return with_mean or found[-1:]


def pad_to(draft: Draft, holder: Path, divisor: int) -> bool:
    """Let the data preprocessor pad images to multiples of a number.

    Returns:
        Whether anything was changed.
    """
    before = len(draft.changes)
    for path in _preprocessors(draft, holder):
        if (draft.get((*path, 'pad_size_divisor')) or 1) % divisor:
            draft.put((*path, 'pad_size_divisor'), divisor, 'the neck needs maps that halve exactly')
    return len(draft.changes) > before


def note_lost_options(draft: Draft, backbone: dict[str, Any]) -> None:
    """Say which options of the old backbone are gone with it."""
    lost = [key for key in _NO_COUNTERPART if backbone.get(key)]
    if lost:
        draft.unknowns.append(
            f'{", ".join(lost)} of the old backbone: MILA has no counterpart, and the config no '
            'longer does what its name says'
        )
