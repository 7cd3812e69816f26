"""A first look at a config and its files, before torch, mmdet and mmseg are imported: most mistakes show by then.

It looks up in the source what the whole check later asks of imported classes, and uses the same functions: what it
refuses that refuses too, and what it does not know it leaves alone. Of files it reads those of data sets that load as
``CocoDataset`` and ``BaseSegDataset`` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import config as reading

from mila_mm.datasets.checks.cache import cache_folder
from mila_mm.datasets.checks.findings import Report
from mila_mm.engine.config.checks import check_data
from mila_mm.engine.config.load import load_config, scope_of
from mila_mm.engine.data.arguments import check_arguments, imports_own
from mila_mm.engine.data.files import check_files
from mila_mm.engine.data.image_headers import check_image_sizes
from mila_mm.engine.data.map_folders import check_map_folder
from mila_mm.engine.data.one_value import check_one_value
from mila_mm.engine.data.splits import splits_of
from mila_mm.engine.data.static import check_static

HINT = 'mila check-data CONFIG tells everything at once; --no-check starts anyway'

# Larger files take longer than the imports that this look goes before; they are read once, by the whole check.
_LARGE = 20 << 20


def first_look(config: str, cfg_options: Sequence[str], stages: Sequence[str]) -> None:
    """Refuse what a config and its files show to be wrong by themselves.

    Args:
        config: Path or name, as :func:`mila_mm.engine.config.load.load_config` takes it.
        cfg_options: Overrides as ``key.of.entry=value``.
        stages: Those that will run, of 'train', 'val', 'test'; 'val' only counts where the config validates.

    Raises:
        UserError: If something is wrong.
    """
    with _silent():
        cfg = load_config(config, cfg_options, import_custom_modules=False)
    scope = scope_of(cfg)
    stages = [stage for stage in stages if stage != 'val' or cfg.get('val_cfg')]
    check_data(cfg, stages)
    if imports_own(cfg):  # which may put other classes under the names that are known here
        return
    report = Report()
    splits = splits_of(cfg, stages, scope, by_source=True) if scope in ('mmdet', 'mmseg') else []
    if not splits or any(split.kind is None for split in splits):
        report.add(check_arguments(cfg, stages, scope))
        report.refuse(HINT)
        return
    report.add(check_static(cfg, stages, scope, splits))
    if scope == 'mmseg' and 'train' in stages:
        report.add(check_one_value(cfg))
    small = [split for split in splits if (_size(split.local_ann_file) or 0) <= _LARGE]
    check_files(cfg, small, cache_folder(), report)
    for split in small if not report.of('error') else []:
        if split.key in report.counts:  # a file that is well-formed
            report.add(check_image_sizes(split))
    for split in splits if scope == 'mmseg' else []:
        report.add(check_map_folder(cfg, split))
    report.refuse(HINT)


def _size(path: Path | None) -> int | None:
    return path.stat().st_size if path is not None and path.is_file() else None


@contextmanager
def _silent() -> Iterator[None]:
    """Let mmengine not tell which variables it puts into a config: its logger imports torch, and it is told later."""
    said, reading.print_log = reading.print_log, lambda *_, **__: None
    try:
        yield
    finally:
        reading.print_log = said
