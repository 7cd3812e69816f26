import ast
import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mila_mm
from mila_mm.compat import finder
from mila_mm.compat.mmcv_ext import is_stand_in
from mila_mm.compat.mmcv_ext.table import NOT_PROVIDED, OPS, OpNotProvidedError
from mila_mm.errors import UserError

ROOT = Path(mila_mm.__file__).parents[1]


def run_python(code: str, *path: Path) -> str:
    """Run code in a fresh interpreter, with ``path`` before everything else, and return what it printed."""
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, (*path, ROOT)))}
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def mmcv_without_ops(tmp_path: Path) -> Path:
    """A tiny package 'mmcv' without compiled ops."""
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').touch()
    return tmp_path


def test_import_is_light_and_lazy() -> None:
    code = """
import sys, time
before = set(sys.modules)
begin = time.process_time()  # not the clock on the wall, which a busy machine stretches
import mila_mm
took = time.process_time() - begin
heavy = {m.partition('.')[0] for m in set(sys.modules) - before}
print(took < 0.2, heavy & {'torch', 'torchvision', 'numpy', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'triton', 'timm'})
names = set(mila_mm.__all__)
print(mila_mm.__version__ == mila_mm.version.__version__, {'MILA', 'models', 'ops'} <= names <= set(dir(mila_mm)))
try:
    mila_mm.nothing
except AttributeError as error:
    print(error)
"""
    assert run_python(code).splitlines() == [
        'True set()',
        'True True',
        "module 'mila_mm' has no attribute 'nothing'",
    ]


def test_the_finder_answers_one_name() -> None:
    ours = finder.StandInFinder()
    for name in ('mmcv', 'mmcv.ops', 'mmcv._ext.nms', '_ext', 'mmcv._extra', 'torch', 'mila_mm'):
        assert ours.find_spec(name) is None
    assert ours.find_spec('mmcv._ext').origin == 'mila_mm.compat.mmcv_ext'


def test_it_stands_once_and_last_however_often_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'meta_path', [*sys.meta_path])
    for _ in range(3):
        finder.install()
    reloaded = importlib.reload(finder)
    reloaded.install()
    ours = [f for f in sys.meta_path if type(f).__qualname__ == 'StandInFinder']
    assert len(ours) == 1 and sys.meta_path[-1] is ours[0]


def test_reloading_the_package_changes_nothing() -> None:
    code = """
import importlib, sys, mila_mm
for _ in range(2):
    importlib.reload(mila_mm)
for name in [n for n in sys.modules if n.startswith('mila_mm')]:
    del sys.modules[name]
import mila_mm
print([type(f).__qualname__ for f in sys.meta_path if type(f).__module__.startswith('mila_mm')])
"""
    assert run_python(code) == "['PatchFinder', 'StandInFinder']"


def test_the_stand_in_serves_where_nothing_is_compiled(mmcv_without_ops: Path) -> None:
    code = """
import mila_mm, sys
from mila_mm.compat.mmcv_ext import is_stand_in
print(is_stand_in(), 'torch' in sys.modules)
import mmcv._ext, pkgutil
print(mmcv._ext.__spec__.origin, callable(mmcv._ext.nms), 'torch' in sys.modules)
"""
    assert run_python(code, mmcv_without_ops).splitlines() == ['True False', 'mila_mm.compat.mmcv_ext True True']


def test_a_line_in_a_pth_file_serves_code_that_does_not_import_it(mmcv_without_ops: Path) -> None:
    (mmcv_without_ops / 'mila_mm_first.pth').write_text('import mila_mm\n')
    code = (
        f'import site; site.addsitedir({str(mmcv_without_ops)!r})\nimport mmcv._ext\nprint(mmcv._ext.__spec__.origin)'
    )
    assert run_python(code, mmcv_without_ops) == 'mila_mm.compat.mmcv_ext'


def test_a_compiled_mmcv_wins(mmcv_without_ops: Path) -> None:
    (mmcv_without_ops / 'mmcv' / '_ext.py').write_text('nms = "compiled"')
    code = """
import mila_mm
from mila_mm.compat.mmcv_ext import is_stand_in
import mmcv._ext
print(is_stand_in(), mmcv._ext.nms)
"""
    assert run_python(code, mmcv_without_ops) == 'False compiled'


def test_a_broken_compiled_mmcv_is_not_hidden(mmcv_without_ops: Path) -> None:
    (mmcv_without_ops / 'mmcv' / '_ext.py').write_text('raise ImportError("undefined symbol: _ZN3c10")')
    code = """
import mila_mm
try:
    import mmcv._ext
except ImportError as error:
    print(error)
"""
    assert run_python(code, mmcv_without_ops) == 'undefined symbol: _ZN3c10'


def test_a_late_import_warns(mmcv_without_ops: Path) -> None:
    (mmcv_without_ops / 'mmdet' / 'models').mkdir(parents=True)
    (mmcv_without_ops / 'mmdet' / '__init__.py').touch()
    (mmcv_without_ops / 'mmdet' / 'models' / '__init__.py').touch()
    code = """
import warnings, mmcv, mmdet.models
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import mila_mm
print(len(caught), caught[0].message)
"""
    printed = run_python(code, mmcv_without_ops)
    assert printed.startswith('1 mmdet.models was imported before mila_mm') and 'mila run mmdet' in printed


def names_mmcv_asks_for() -> set[str]:
    """Every name in a load_ext call of the installed mmcv's ops."""
    import mmcv.ops

    names: set[str] = set()
    for source in Path(mmcv.ops.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(source.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'load_ext':
                names |= set(ast.literal_eval(node.args[1]))
    return names


def test_every_name_mmcv_asks_for_is_in_the_table() -> None:
    asked = names_mmcv_asks_for()
    provided = {op.name for op in OPS} | {'get_compiler_version', 'get_compiling_cuda_version'}
    missing = {name for family in NOT_PROVIDED.values() for name in family}
    assert len(asked) > 100
    assert asked <= provided | missing
    assert not provided & missing


def home(thing: Any) -> str:
    """Return the module of a function or class; newer torch knows none of a Function's apply, but of its class."""
    return thing.__module__ or thing.__self__.__module__


def test_ops_that_models_call_are_provided() -> None:
    """Every module of mmcv.ops that mmdet's or mmseg's models import asks only for ops that are provided."""
    import mmcv.ops
    import mmdet
    import mmseg

    used: set[str] = set()
    for package in (mmdet, mmseg):
        for source in Path(package.__file__).parent.joinpath('models').rglob('*.py'):
            for node in ast.walk(ast.parse(source.read_text(encoding='utf-8'))):
                if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('mmcv.ops'):
                    used |= {alias.name for alias in node.names}
    modules = {sys.modules[home(getattr(mmcv.ops, name))] for name in used if hasattr(mmcv.ops, name)}
    assert {'batched_nms', 'DeformConv2d', 'MultiScaleDeformableAttention', 'PSAMask'} <= used
    asked: set[str] = set()
    for module in modules:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'load_ext':
                asked |= set(ast.literal_eval(node.args[1]))
    # Of mmcv/ops/nms.py, the models call the functions for axis-aligned boxes only.
    assert asked - {op.name for op in OPS} == {'nms_rotated', 'nms_quadri'}


@pytest.mark.parametrize('name', ['knn_forward', 'nms_rotated', 'an_op_of_a_newer_mmcv'])
def test_what_is_not_provided_says_so_on_call(stand_in: ModuleType, name: str) -> None:
    function = getattr(stand_in, name)
    with pytest.raises(NotImplementedError, match=f"'{name}'.*MMCV_WITH_OPS=1") as caught:
        function(1, two=2)
    assert isinstance(caught.value, (OpNotProvidedError, UserError))
    assert len(str(caught.value).splitlines()) <= 2
    assert not hasattr(stand_in, '_private') and not hasattr(stand_in, '__path__')


def test_mmcv_says_what_it_runs_on() -> None:
    from mmcv.ops import get_compiler_version, get_compiling_cuda_version

    if not is_stand_in():
        pytest.skip('mmcv is compiled here')
    assert 'mila_mm' in get_compiler_version() and 'mila_mm' in get_compiling_cuda_version()


def test_the_documented_table_is_in_step() -> None:
    page = ROOT / 'docs' / 'mmcv_ops.md'
    docs = runpy.run_path(str(ROOT / 'tools' / 'docs' / 'mmcv_ops.py'))
    assert page.read_text(encoding='utf-8') == docs['render'](), 'run: python tools/docs/mmcv_ops.py docs/mmcv_ops.md'
