"""yapf is imported also while another process writes its cache."""

import pickle
import sys
import types

import pytest

from mila_mm.engine.config import yapf_cache
from mila_mm.errors import UserError


@pytest.fixture
def failing(monkeypatch):
    """Let the import fail as often as asked, and leave behind what an import that failed leaves."""

    def fail(times, error):
        calls = []

        def load(name):
            assert name == 'yapf.yapflib.yapf_api' and 'yapf.half' not in sys.modules
            calls.append(name)
            if len(calls) <= times:
                sys.modules['yapf.half'] = types.ModuleType('yapf.half')
                raise error
            return 'yapf'

        monkeypatch.setattr(yapf_cache.importlib, 'import_module', load)
        monkeypatch.setattr(yapf_cache.time, 'sleep', lambda seconds: None)
        monkeypatch.setattr(yapf_cache.sys, 'modules', {**sys.modules})
        return calls

    return fail


@pytest.mark.parametrize('error', [EOFError('Ran out of input'), pickle.UnpicklingError('truncated')])
def test_a_file_that_is_being_written_is_read_again(failing, error):
    calls = failing(3, error)
    assert yapf_cache.import_yapf() == 'yapf' and len(calls) == 4


def test_a_cache_that_stays_broken_is_told(failing):
    failing(99, EOFError('Ran out of input'))
    with pytest.raises(UserError, match=r'yapf cannot read .*EOFError: Ran out of input.*remove .*YAPF'):
        yapf_cache.import_yapf()


def test_other_errors_are_not_hidden(failing):
    failing(1, ImportError('no yapf'))
    with pytest.raises(ImportError, match='no yapf'):
        yapf_cache.import_yapf()
