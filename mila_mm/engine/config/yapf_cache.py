"""Importing yapf, by which mmengine lays out configs, where several processes do so for the first time."""

from __future__ import annotations

import importlib
import pickle
import sys
import time
from types import ModuleType

from mila_mm.errors import UserError

_TRIES, _FIRST_PAUSE = 6, 0.05


def import_yapf() -> ModuleType:
    """Import ``yapf.yapflib.yapf_api``.

    Its first import in an environment writes grammars into the user's cache under their names before their content, so
    that another process of the same job may read an empty file. It is then imported once more.

    Raises:
        UserError: If the cache stays unreadable.
    """
    for attempt in range(_TRIES):
        try:
            return importlib.import_module('yapf.yapflib.yapf_api')
        except (EOFError, pickle.UnpicklingError) as error:
            reason = error
        for name in [name for name in sys.modules if name.partition('.')[0] in ('yapf', 'yapf_third_party')]:
            del sys.modules[name]
        time.sleep(_FIRST_PAUSE * 2**attempt)
    raise UserError(
        f'yapf cannot read the grammars in its cache ({type(reason).__name__}: {reason}); remove the folder YAPF in '
        'your cache (~/.cache/YAPF)'
    ) from reason
