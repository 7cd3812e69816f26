"""The import hook that supplies ``mmcv._ext`` where mmcv was installed without its compiled ops."""

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_EXT_NAME = 'mmcv._ext'


# importlib.abc would take longer to import than the rest of the package: finders and loaders need no base class.
class _StandInLoader:
    """Fills a fresh module ``mmcv._ext`` from the op table."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let Python create an ordinary module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Put every op into the module; this is the first moment that imports torch."""
        from mila_mm.compat.mmcv_ext.table import populate

        populate(module)


class StandInFinder:
    """Answers for ``mmcv._ext`` and for no other name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the stand-in, or None for any other module."""
        if fullname != _EXT_NAME:
            return None
        return ModuleSpec(fullname, _StandInLoader(), origin='mila_mm.compat.mmcv_ext')


def install() -> None:
    """Append the hook to ``sys.meta_path``, once however often it is called or reloaded.

    Warns where mmdet or mmseg were imported earlier without mmcv's ops: their modules then hold
    functions that only raise, and no later hook can change that.
    """
    # By name: after a reload of this module the class is another object.
    sys.meta_path[:] = [f for f in sys.meta_path if not _is_ours(f)]
    sys.meta_path.append(StandInFinder())
    late = [name for name in ('mmdet.structures.mask', 'mmdet.models', 'mmseg.models') if name in sys.modules]
    if late and 'mmcv' in sys.modules and _EXT_NAME not in sys.modules:
        warnings.warn(
            f'{", ".join(late)} was imported before mila_mm, while mmcv has no compiled ops: its calls of mmcv.ops '
            'will raise. Import mila_mm first; tools of mmdet and mmseg run by: mila run mmdet TOOL',
            stacklevel=3,
        )


def is_stand_in() -> bool:
    """Tell whether ``mmcv._ext`` is, or would be, the stand-in and not a compiled module.

    Returns:
        bool: True where the stand-in serves, False where mmcv has compiled ops.

    Raises:
        ModuleNotFoundError: If mmcv is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec(_EXT_NAME)
    return spec is not None and spec.origin == 'mila_mm.compat.mmcv_ext'


def _is_ours(finder: object) -> bool:
    kind = finder if isinstance(finder, type) else type(finder)
    return (kind.__module__, kind.__qualname__) == (StandInFinder.__module__, StandInFinder.__qualname__)
