"""Makes ``mmseg::...`` configs resolve in both lineages of OpenMMLab, and installs nothing, ever.

mmengine looks up ``mmseg::`` under the distribution name 'mmsegmentation'. Under
onedl-mmsegmentation that name is not installed: a ``_base_`` then fails, and
``mmengine.hub.get_config`` runs pip, which overwrites onedl's files with upstream's. Here mmengine's
table is corrected as soon as mmengine is imported, and its runtime ``pip install`` becomes an error.
So it is with ``mmpretrain::``.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from mila_mm.compat.import_hook import when_imported
from mila_mm.errors import UserError

_DISTRIBUTIONS = {
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
    for package in table.keys() & _DISTRIBUTIONS.keys():
        for name in _DISTRIBUTIONS[package]:
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


def install() -> None:
    """Patch mmengine as soon as it is imported."""
    when_imported('mmengine.config.utils', name_what_is_installed)
    when_imported('mmengine.utils.package_utils', refuse_installs)
