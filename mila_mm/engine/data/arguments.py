"""Types and arguments in a config that nothing knows, told from the source and before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mmengine import registry as root_registries
from mmengine.config import Config

from mila_mm.datasets.checks.findings import Finding, error, warning
from mila_mm.engine.config.build_errors import did_you_mean, unexpected_argument
from mila_mm.engine.config.signatures import arguments_of, swallows
from mila_mm.engine.config.sources import SourceClass, find_class, mentions, names_registered, readable
from mila_mm.engine.data.keys import OLD_DATASET_KEYS, OLD_LOADER_KEYS, OLD_TRANSFORM_KEYS, OLD_TRANSFORMS
from mila_mm.engine.data.kinds import LIBRARIES, find_kind, places, registered_now

# What is taken out of a part before it is built, by registry.
_TAKEN_OUT = {
    'HOOKS': {'priority'},
    'LOOPS': {'by_epoch'},
    'OPTIM_WRAPPERS': {'constructor', 'paramwise_cfg'},
    'PARAM_SCHEDULERS': {'convert_to_iter_based'},
    'LOADERS': {'num_batch_per_epoch', 'disable_subprocess_warning'},  # what mmengine reads before torch's DataLoader
}
# Transforms that hold other transforms, in ``transforms``; what others hold may be of another library.
_HOLDERS = ('Compose', 'RandomApply', 'RandomChoice', 'TestTimeAug', 'KeyMapper', 'TransformBroadcaster')
# Parts of a model that are built from their config as it is.
_MODEL_PARTS = (
    'backbone', 'neck', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'decode_head', 'auxiliary_head',
    'semantic_head', 'panoptic_head', 'panoptic_fusion_head', 'data_preprocessor', 'bbox_roi_extractor',
    'mask_roi_extractor', 'mask_iou_head',
)  # fmt: skip
# What is told by its successor.
_TOLD_BY_KEY = {
    'DATASETS': set(OLD_DATASET_KEYS),
    'LOADERS': set(OLD_LOADER_KEYS),
    'TRANSFORMS': {name for _, name in OLD_TRANSFORM_KEYS},
}


_OLD_TYPES = {'CustomDataset': 'BaseDetDataset, for a COCO JSON CocoDataset; mmseg has BaseSegDataset'}


class Part(NamedTuple):
    """A part of a config that a registry builds, in the scope that it or what holds it names."""

    key: str
    registry: str
    config: dict[str, Any]
    scope: str | None


def check_arguments(cfg: Config, stages: Sequence[str], scope: str) -> list[Finding]:
    """Find types and arguments that nothing knows, in the words in which building the part would refuse them.

    Nothing is said where anything is not certain: classes of the user's, ``**kwargs`` that go elsewhere.

    Args:
        cfg: A config.
        stages: Those that will run, of 'train', 'val', 'test'.
        scope: 'mmdet', 'mmseg' or 'mmpretrain'.
    """
    if imports_own(cfg) or cfg.get('runner_type'):
        return []
    findings = []
    for part in _parts(cfg, stages):
        if part.scope not in (None, scope):
            continue
        kind = find_kind(part.registry, part.config, scope)
        if kind is not None:
            findings += _unexpected(part, kind)
        elif _is_unknown(part, scope, cfg):
            findings.append(error(part.key, _unknown(part, scope)))
    loader = find_class('torch.utils.data.dataloader', 'DataLoader')
    for stage in stages:
        config = cfg.get(f'{stage}_dataloader')
        if loader is not None and isinstance(config, dict):
            findings += _unexpected(
                Part(f'{stage}_dataloader', 'LOADERS', {**config, 'type': 'DataLoader'}, None), loader
            )
    return findings


def imports_own(cfg: Config) -> bool:
    """Tell whether a config imports something else than the libraries, which may put classes under their names."""
    imports = cfg.get('custom_imports') or {}
    if not isinstance(imports, dict):
        return True  # loading the config says what is wrong
    return any(package not in LIBRARIES for package in _imported(cfg))


def _imported(cfg: Config) -> set[str]:
    named = (cfg.get('custom_imports') or {}).get('imports') or ()
    return {str(module).partition('.')[0] for module in ([named] if isinstance(named, str) else named)}


def _unexpected(part: Part, kind: SourceClass) -> list[Finding]:
    elsewhere = {'type', '_scope_'} | _TAKEN_OUT.get(part.registry, set()) | _TOLD_BY_KEY.get(part.registry, set())
    given = [name for name in part.config if name not in elsewhere]
    known = arguments_of(kind, given) if given else None
    wrong = [name for name in given if known is not None and name not in known]
    if wrong:
        return [error(part.key, unexpected_argument(str(part.config['type']), wrong[0], known or ()))]
    # Published configs hand their heads some that nothing reads; what looks like another one is a slip.
    known = swallows(kind) if given and known is None and part.registry == 'METRICS' else None
    for name in given if known is not None else ():
        if name not in known and (like := did_you_mean(name, known)):
            text = f'is read by nothing: {part.config["type"]} lets any argument pass{like}'
            return [warning(f'{part.key}.{name}', text)]
    return []


def _is_unknown(part: Part, scope: str, cfg: Config) -> bool:
    """Tell whether a type is one that nothing can have registered: its name stands nowhere in the libraries."""
    name = part.config.get('type')
    if not isinstance(name, str) or not name.isidentifier() or scope not in ('mmdet', 'mmseg'):
        return False
    if name in _OLD_TYPES:
        return part.registry == 'DATASETS'
    asked = (scope, 'mmcv', 'mmengine', 'mila_mm')
    if (
        not all(readable(package) for package in asked)
        or name in OLD_TRANSFORMS
        or registered_now(part.registry, scope, name)
    ):
        return False
    return not any(mentions(package, name) for package in {*asked, *_imported(cfg)})


def _unknown(part: Part, scope: str) -> str:
    if part.config['type'] in _OLD_TYPES:
        return f'{part.config["type"]} is of mmdet 2 or mmseg 0; its successor is {_OLD_TYPES[part.config["type"]]}'
    names = set().union(*(names_registered(*place, part.registry) for place in places(part.registry, scope)))
    kind = part.config['type']
    called = getattr(root_registries, part.registry).name
    return f'{kind} is not in the {scope}::{called} registry{did_you_mean(kind, names)}'


def _parts(cfg: Config, stages: Sequence[str]) -> Iterator[Part]:
    """Go through what is built of a config for some stages."""
    for stage in stages:
        loader = cfg.get(f'{stage}_dataloader')
        if isinstance(loader, dict):
            yield from _datasets(f'{stage}_dataloader.dataset', loader.get('dataset'))
            for name in ('sampler', 'batch_sampler'):
                yield from _one(f'{stage}_dataloader.{name}', 'DATA_SAMPLERS', loader.get(name))
        evaluator = cfg.get(f'{stage}_evaluator')
        metrics = evaluator.get('metrics', evaluator) if isinstance(evaluator, dict) else evaluator
        yield from _each(f'{stage}_evaluator', 'METRICS', metrics)
        yield from _one(f'{stage}_cfg', 'LOOPS', cfg.get(f'{stage}_cfg'))
    if 'train' in stages:
        yield from _one('optim_wrapper', 'OPTIM_WRAPPERS', cfg.get('optim_wrapper'))
        yield from _each('param_scheduler', 'PARAM_SCHEDULERS', cfg.get('param_scheduler'))
    default_hooks = cfg.get('default_hooks')
    for name, hook in default_hooks.items() if isinstance(default_hooks, dict) else ():
        yield from _one(f'default_hooks.{name}', 'HOOKS', hook)
    yield from _each('custom_hooks', 'HOOKS', cfg.get('custom_hooks'))
    visualizer = cfg.get('visualizer')
    yield from _one('visualizer', 'VISUALIZERS', visualizer)
    if isinstance(visualizer, dict):
        yield from _each('visualizer.vis_backends', 'VISBACKENDS', visualizer.get('vis_backends'))
    yield from _model('model', cfg.get('model'))


def _within(config: dict[str, Any], scope: str | None) -> str | None:
    """Return the scope in which a part and all that it builds are looked up."""
    return config.get('_scope_') or scope


def _one(key: str, registry: str, config: Any, scope: str | None = None) -> Iterator[Part]:
    if isinstance(config, dict) and 'type' in config:
        yield Part(key, registry, config, _within(config, scope))


def _each(key: str, registry: str, configs: Any) -> Iterator[Part]:
    if isinstance(configs, (list, tuple)):
        for index, config in enumerate(configs):
            yield from _one(f'{key}.{index}', registry, config)
    else:
        yield from _one(key, registry, configs)


def _datasets(key: str, dataset: Any, scope: str | None = None) -> Iterator[Part]:
    """Go through a data set, those that it wraps, and their transforms."""
    if not isinstance(dataset, dict):
        return
    scope = _within(dataset, scope)
    yield from _one(key, 'DATASETS', dataset, scope)
    yield from _transforms(f'{key}.pipeline', dataset.get('pipeline'), scope)
    yield from _datasets(f'{key}.dataset', dataset.get('dataset'), scope)
    inner = dataset.get('datasets')
    for index, each in enumerate(inner if isinstance(inner, (list, tuple)) else ()):
        yield from _datasets(f'{key}.datasets.{index}', each, scope)


def _transforms(key: str, steps: Any, scope: str | None) -> Iterator[Part]:
    if isinstance(steps, (list, tuple)):
        for index, step in enumerate(steps):
            yield from _transforms(f'{key}.{index}', step, scope)
    elif isinstance(steps, dict) and 'type' in steps:
        yield from _one(key, 'TRANSFORMS', steps, scope)
        if steps['type'] in _HOLDERS:
            yield from _transforms(f'{key}.transforms', steps.get('transforms'), _within(steps, scope))


def _model(key: str, part: Any, scope: str | None = None) -> Iterator[Part]:
    if isinstance(part, (list, tuple)):
        for index, each in enumerate(part):
            yield from _model(f'{key}.{index}', each, scope)
    elif isinstance(part, dict):
        yield from _one(key, 'MODELS', part, scope)
        for name in _MODEL_PARTS:
            yield from _model(f'{key}.{name}', part.get(name), _within(part, scope))
