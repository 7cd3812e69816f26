"""Patches of foreign modules, applied as soon as somebody imports them."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Patch = Callable[[ModuleType], None]

_patches: dict[str, list[Patch]] = {}


class PatchFinder:
    """Finds the modules named to :func:`when_imported` as the other finders do, and patches them once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the genuine spec, its loader followed by the patch; None for all other modules."""
        if fullname not in _patches:
            return None
        specs = (f.find_spec(fullname, path, target) for f in sys.meta_path if not _is_ours(f))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run: Callable[[ModuleType], Any] = spec.loader.exec_module

        def run_then_patch(module: ModuleType) -> None:
            run(module)
            for patch in _patches[fullname]:
                patch(module)

        # The loader stays the genuine one, so that inspect and linecache still find the source.
        spec.loader.exec_module = run_then_patch  # type: ignore[method-assign]
        return spec


def when_imported(name: str, patch: Patch) -> None:
    """Call ``patch`` with the module ``name`` once it has been imported: now if it has been, else right after it is.

    Args:
        patch: What to do with it. Once for each function, however often it is named here.
    """
    patches = _patches.setdefault(name, [])
    same = [known for known in patches if _name(known) == _name(patch)]
    patches[:] = [known for known in patches if known not in same] + [patch]
    if name in sys.modules:
        patch(sys.modules[name])
    sys.meta_path[:] = [f for f in sys.meta_path if not _is_ours(f)]
    sys.meta_path.insert(0, PatchFinder())


def _name(thing: object) -> tuple[str, str]:
    # By name: after a reload the function is another object.
    return (thing.__module__, thing.__qualname__)  # type: ignore[attr-defined]


def _is_ours(finder: object) -> bool:
    return _name(finder if isinstance(finder, type) else type(finder)) == _name(PatchFinder)
