"""What the source of a class says of its constructor is what Python says once it is imported."""

import sys
import uuid
from pathlib import Path

import pytest

from mila_mm.engine.config.build_errors import _arguments
from mila_mm.engine.config.signatures import arguments_of
from mila_mm.engine.config.sources import SourceClass, find_class, names_registered, registered

PLACES = [
    ('mmdet', 'datasets', 'TRANSFORMS'), ('mmdet', 'datasets', 'DATASETS'), ('mmdet', 'evaluation', 'METRICS'),
    ('mmdet', 'engine', 'HOOKS'), ('mmdet', 'models', 'MODELS'), ('mmseg', 'datasets', 'TRANSFORMS'),
    ('mmseg', 'datasets', 'DATASETS'), ('mmseg', 'models', 'MODELS'), ('mmcv', 'transforms', 'TRANSFORMS'),
    ('mmengine', 'hooks', 'HOOKS'), ('mmengine', 'optim', 'PARAM_SCHEDULERS'), ('mmengine', 'runner', 'LOOPS'),
    ('mila_mm', 'models', 'MODELS'), ('mila_mm', 'engine', 'HOOKS'),
]  # fmt: skip


@pytest.mark.parametrize(('package', 'folder', 'registry'), PLACES)
def test_arguments_are_those_of_the_class_that_is_imported(package, folder, registry) -> None:
    from mmdet.utils import register_all_modules
    from mmseg.utils import register_all_modules as register_all_of_mmseg

    import mila_mm.engine.components
    import mila_mm.models  # noqa: F401

    register_all_modules(init_default_scope=False)
    register_all_of_mmseg(init_default_scope=False)
    names = names_registered(package, folder, registry)
    known = 0
    for name in names:
        found = registered(package, folder, registry, name)
        kind = getattr(sys.modules.get(found.module), found.name, None) if found is not None else None
        told = arguments_of(found) if kind is not None else None
        if told is not None:
            known += 1
            assert told == _arguments(kind), f'{found} {kind}'
    assert known >= len(names) / 2, f'{known} of {len(names)}'


MODULE = """
import helper
from abc import ABCMeta

class Base(metaclass=ABCMeta):
    def __init__(self, a, *, b=1): ...

class Up(Base):
    def __init__(self, c, **kwargs):
        super().__init__(**kwargs)

class Named(Base):
    def __init__(self, *args, c=0, **rest):
        super(Named, self).__init__(*args, **rest)

class Without(Up): ...

class Left(Base):
    def __init__(self, left, **kwargs):
        super().__init__(**kwargs)

class Right(Base):
    def __init__(self, right, **kwargs):
        super().__init__(**kwargs)

class Both(Left, Right): ...

class Popped(Base):
    def __init__(self, **kwargs):
        kwargs.pop('old', None)
        super().__init__(**kwargs)

class Kept:
    def __init__(self, **kwargs):
        self.options = kwargs

class Foreign(helper.Thing):
    def __init__(self, d, **kwargs):
        super().__init__(**kwargs)

class ForeignClosed(helper.Thing):
    def __init__(self, d): ...

@helper.decorated
class Decorated:
    def __init__(self, d): ...

class DecoratedConstructor:
    @helper.decorated
    def __init__(self, d): ...

class Made:
    def __new__(cls, *args): ...

class Alone: ...

if helper.NEW:
    class Twice:
        def __init__(self, new): ...
else:
    class Twice:
        def __init__(self, old): ...
"""
ARGUMENTS = {
    'Base': {'a', 'b'},
    'Up': {'a', 'b', 'c'},
    'Named': {'a', 'b', 'c'},
    'Without': {'a', 'b', 'c'},
    'Both': {'a', 'b', 'left', 'right'},
    'Popped': None,
    'Kept': None,
    'Foreign': None,
    'ForeignClosed': {'d'},
    'Decorated': None,
    'DecoratedConstructor': None,
    'Made': None,
    'Alone': set(),
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that must not be imported, of a name that no other test has looked for."""
    folder = tmp_path / f'own_{uuid.uuid4().hex}'
    folder.mkdir()
    (folder / 'parts.py').write_text(MODULE)
    (folder / '__init__.py').write_text('raise RuntimeError("imported")\n')
    (folder / 'again.py').write_text('from .parts import Up as Renamed\nfrom .again import Circle\n')
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.mark.parametrize('name', ARGUMENTS)
def test_what_is_not_certain_is_not_said(package, name) -> None:
    assert arguments_of(SourceClass(f'{package.name}.parts', name)) == ARGUMENTS[name]


def test_classes_are_found_through_imports_where_there_is_one_of_the_name(package) -> None:
    assert find_class(f'{package.name}.again', 'Renamed') == SourceClass(f'{package.name}.parts', 'Up')
    for module, name in (('again', 'Circle'), ('parts', 'Twice'), ('parts', 'ABCMeta'), ('nowhere', 'Up')):
        assert find_class(f'{package.name}.{module}', name) is None
    assert find_class('no_such_package.parts', 'Up') is None


def test_names_of_decorators(package) -> None:
    (package / 'named.py').write_text(
        '@ROOT.register_module()\n@HOOKS.register_module()\nclass One: ...\n'
        "@HOOKS.register_module(name=['Two', 'Deux'])\nclass Second: ...\n"
        "@HOOKS.register_module('Three')\nclass Third: ...\n"
        '@HOOKS.register_module(force=True)\n@other\nclass Four: ...\n'
    )
    assert names_registered(package.name, '', 'HOOKS') == {'One', 'Two', 'Deux', 'Three', 'Four'}
    assert registered(package.name, '', 'HOOKS', 'Deux') == SourceClass(f'{package.name}.named', 'Second')
    assert registered(package.name, '', 'HOOKS', 'Second') is None
