"""Makes ``mmseg::...`` configs resolve in both lineages of OpenMMLab, and installs nothing, ever.

mmengine looks up ``mmseg::`` under the distribution name 'mmsegmentation'. Under
onedl-mmsegmentation that name is not installed: a ``_base_`` then fails, and
``mmengine.hub.get_config`` runs pip, which overwrites onedl's files with upstream's. Here mmengine's
table is corrected as soon as mmengine is imported, and its runtime ``pip install`` becomes an error.
So it is with ``mmpretrain::``.

The same mechanism makes MILA's classifiers known to timm as soon as timm is imported.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from mila_mm.errors import UserError

DISTRIBUTIONS = {
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
}


def name_what_is_installed(module: ModuleType) -> None:
    """Let ``mmengine.config.utils.MODULE2PACKAGE`` name the distributions that are installed.

    A checkout that is only on the path is named by its module; for a package that is not there
    at all, or of which mmengine has not heard, the table stays as it is.
    """
    from importlib.metadata import PackageNotFoundError, distribution
    from importlib.util import find_spec

    table: dict[str, str] = module.MODULE2PACKAGE
    for package in table.keys() & DISTRIBUTIONS.keys():
        for name in DISTRIBUTIONS[package]:
            try:
                distribution(name)
            except PackageNotFoundError:
                continue
            table[package] = name
            break
        else:
            if find_spec(package) is not None:
                table[package] = package


def refuse_installs(module: ModuleType) -> None:
    """Replace the command with which ``mmengine.utils.install_package`` runs pip by an error."""

    def call_command(cmd: Sequence[str]) -> NoReturn:
        """Raise where mmengine would have installed a package at run time."""
        raise UserError(
            f"'{cmd[-1]}' is not installed, and mila_mm lets nothing install packages at run time (mmengine wanted "
            f"to run '{' '.join(cmd)}'). Install it yourself, then run again."
        )

    module.call_command = call_command


def register_classifiers(_: ModuleType) -> None:
    """Let timm know ``mila_tiny`` and its like."""
    import_module('mila_mm.nn.timm')


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    'mmengine.config.utils': name_what_is_installed,
    'mmengine.utils.package_utils': refuse_installs,
    'timm.models': register_classifiers,
}


class PatchFinder:
    """Finds the modules of ``PATCHES`` where the other finders do, and patches them once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the genuine spec, its loader followed by the patch; None for all other modules."""
        if fullname not in PATCHES:
            return None
        specs = (f.find_spec(fullname, path, target) for f in sys.meta_path if not _is_ours(f))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run: Callable[[ModuleType], Any] = spec.loader.exec_module

        def run_then_patch(module: ModuleType) -> None:
            run(module)
            PATCHES[fullname](module)

        # The loader stays the genuine one, so that inspect and linecache still find the source.
        spec.loader.exec_module = run_then_patch  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Patch mmengine's modules that are imported already, and the others when they will be."""
    for name, patch in PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])
    sys.meta_path[:] = [f for f in sys.meta_path if not _is_ours(f)]
    sys.meta_path.insert(0, PatchFinder())


def _is_ours(finder: object) -> bool:
    kind = finder if isinstance(finder, type) else type(finder)
    return (kind.__module__, kind.__qualname__) == (PatchFinder.__module__, PatchFinder.__qualname__)
