import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import mila_mm  # noqa: F401 - supplies mmcv._ext where mmcv is not compiled
from mila_mm.compat.mmcv_ext import is_stand_in


@pytest.fixture(scope='session')
def stand_in() -> ModuleType:
    """The module the stand-in makes, whatever mmcv._ext is here."""
    from mila_mm.compat.mmcv_ext.table import populate

    module = ModuleType('stand_in')
    populate(module)
    return module


@pytest.fixture(autouse=True)
def ops_over_stand_in(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let mmcv.ops call the stand-in in these tests also where mmcv is compiled."""
    if is_stand_in():
        return
    import mmcv.ops  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module'):
            monkeypatch.setattr(module, 'ext_module', stand_in)


@pytest.fixture(autouse=True)
def seed_and_poison() -> Iterator[None]:
    """Seed, and fill buffers from torch.empty with NaN, so that an element that nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
