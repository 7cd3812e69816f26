"""The data sets of a config, one by one: through wrappers, with their classes and what their pipelines read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, Registry

from mila_mm.engine.data.kinds import Kind, attribute_of, find_kind, keeps

STAGES = ('train', 'val', 'test')


@dataclass(frozen=True)
class Split:
    """A data set that reads files.

    Attributes:
        stage: 'train', 'val' or 'test'.
        key: Where it stands in the config.
        config: Its config.
        kind: Its class, or the source of that; None where no registry knows its type.
    """

    stage: str
    key: str
    config: dict[str, Any]
    kind: Kind | None

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names that it will have, None where that shows only once it is built."""
        meta = self.config.get('metainfo')
        own = meta.get('classes') if isinstance(meta, dict) else None
        if isinstance(own, str):
            return tuple(list_from_file(own)) if Path(own).is_file() else None
        names = own or self.meta.get('classes')
        return tuple(names) if isinstance(names, (list, tuple)) else None

    @property
    def meta(self) -> dict[str, Any]:
        """What the class of the data set says by itself."""
        meta = attribute_of(self.kind, 'METAINFO')
        return meta if isinstance(meta, dict) else {}

    @property
    def local_ann_file(self) -> Path | None:
        """Its annotation file, None where it has none or a file backend serves it."""
        name, root = self.config.get('ann_file'), str(self.config.get('data_root') or '')
        if not isinstance(name, str) or not name or self.config.get('backend_args') or '://' in name + root:
            return None
        return Path(root, name)

    @property
    def reads_coco(self) -> bool:
        """Whether it reads its file exactly as ``CocoDataset`` does."""
        return is_coco(self.kind)

    @property
    def drops_as_coco(self) -> bool:
        """Whether it drops images exactly as mmdet's ``CocoDataset`` does."""
        return filters_as_coco(self.kind)

    @property
    def reads_masks(self) -> bool:
        """Whether its pipeline reads instance masks."""
        return any(step.get('with_mask') for step in self.steps if kind_name(step) == 'LoadAnnotations')

    @property
    def reads_polygons_only(self) -> bool:
        """Whether its pipeline passes over masks that are not polygons."""
        return any(step.get('poly2mask') is False for step in self.steps if kind_name(step) == 'LoadAnnotations')

    @property
    def steps(self) -> list[dict[str, Any]]:
        """All transforms of its pipeline, inner ones too."""
        return list(transforms_in(self.config.get('pipeline')))


def splits_of(cfg: Config, stages: Sequence[str], scope: str, by_source: bool = False) -> list[Split]:
    """Return the data sets of a config's stages.

    Args:
        cfg: A config.
        stages: Some of 'train', 'val', 'test'.
        scope: 'mmdet' or 'mmseg'.
        by_source: Whether their classes are looked up in the source, and not imported. Defaults to False.
    """
    found = []
    for stage in stages:
        loader = cfg.get(f'{stage}_dataloader')
        dataset = loader.get('dataset') if isinstance(loader, dict) else None
        if isinstance(dataset, dict):
            for key, inner in leaf_datasets(dataset, f'{stage}_dataloader.dataset'):
                kind: Kind | None = find_kind('DATASETS', inner, scope) if by_source else None
                kind = kind if by_source else resolve(DATASETS, inner.get('type'), scope)
                found.append(Split(stage, key, inner, kind))
    return found


def leaf_datasets(dataset: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Go through wrappers (``dataset=``, ``datasets=[...]``) to the datasets that read files."""
    if isinstance(dataset.get('dataset'), dict):
        yield from leaf_datasets(dataset['dataset'], f'{key}.dataset')
    elif isinstance(dataset.get('datasets'), (list, tuple)):
        for index, inner in enumerate(dataset['datasets']):
            yield from leaf_datasets(inner, f'{key}.datasets.{index}')
    else:
        yield key, dataset


def transforms_in(pipeline: Any) -> Iterator[dict[str, Any]]:
    """Go through a pipeline's config to every transform, those inside of others too."""
    if isinstance(pipeline, dict):
        if 'type' in pipeline:
            yield pipeline
        for value in pipeline.values():
            yield from transforms_in(value)
    elif isinstance(pipeline, (list, tuple)):
        for value in pipeline:
            yield from transforms_in(value)


def kind_name(config: Any) -> str:
    """Return the name of a config's type without its scope, '' where it has none."""
    kind = config.get('type') if isinstance(config, dict) else None
    return str(getattr(kind, '__name__', kind or '')).rpartition('.')[2]


def resolve(registry: Registry, kind: Any, scope: str) -> type | None:
    """Return the class that a type in a config names, None where no registry knows it."""
    if not isinstance(kind, str):
        return kind if isinstance(kind, type) else None
    with registry.switch_scope_and_registry(scope) as scoped:
        try:
            found = scoped.get(kind)
        except (ImportError, KeyError, ValueError):
            return None
    return found if isinstance(found, type) else None


def is_coco(kind: Kind | None) -> bool:
    """Tell whether a data set reads its file exactly as mmdet's ``CocoDataset`` does."""
    return keeps(kind, 'mmdet', 'CocoDataset', ('load_data_list', 'parse_data_info'))


def filters_as_coco(kind: Kind | None) -> bool:
    """Tell whether a data set drops images exactly as mmdet's ``CocoDataset`` does."""
    return keeps(kind, 'mmdet', 'CocoDataset', ('filter_data',))


def reads_voc(kind: type) -> bool:
    """Tell whether a data set reads its XML files exactly as mmdet's ``XMLDataset`` does."""
    return keeps(kind, 'mmdet', 'XMLDataset', ('_parse_instance_info',))
