import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import mila_mm
from mila_mm.compat import import_hook, lineage
from mila_mm.errors import UserError

ROOT = Path(mila_mm.__file__).parents[1]

IN_EITHER_ORDER = """
import os, sys
def audit(event, args):  # whatever would start another program, pip above all, ends the run
    if event in ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn'):
        sys.stderr.write(f'STARTED {{event}} {{args}}')
        sys.stderr.flush()
        os._exit(99)

import {order}
sys.addaudithook(audit)
import importlib, inspect
import mmengine.config.utils as utils
from mmengine.config import Config
from mmengine.hub import get_config

print(get_config('mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py').model.decode_head.type)
print(get_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py').model.type)
config = Config.fromfile({child!r})
print(config.model.type, config.model.test_cfg, config.default_scope)

utils.MODULE2PACKAGE['mmpose'] = 'a-package-that-does-not-exist'
try:
    get_config('mmpose::some/config.py')
except Exception as error:
    print(type(error).__name__, error)

named = utils.MODULE2PACKAGE['mmseg']
importlib.reload(utils)
print(utils.MODULE2PACKAGE['mmseg'] == named, 'MODULE2PACKAGE' in inspect.getsource(utils))
"""


@pytest.mark.parametrize('order', ['mila_mm, mmengine.hub', 'mmengine.hub, mila_mm'], ids=['mila_mm', 'mmengine'])
def test_configs_resolve_and_nothing_is_installed_whichever_comes_first(order: str, tmp_path: Path) -> None:
    child = tmp_path / 'child.py'
    child.write_text(
        "_base_ = ['mmseg::_base_/models/upernet_r50.py', 'mmdet::_base_/default_runtime.py']\n"
        'model = dict(test_cfg=dict(x=1))\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', IN_EITHER_ORDER.format(order=order, child=str(child))],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *found, refusal, reloaded = done.stdout.strip().splitlines()
    assert found == ['UPerHead', 'MaskRCNN', "EncoderDecoder {'mode': 'whole', 'x': 1} mmdet"]
    assert refusal.startswith("UserError 'a-package-that-does-not-exist' is not installed")
    assert reloaded == 'True True'


def test_without_the_patch_mmengine_would_install() -> None:
    # The refusal is worth something only as long as mmengine really runs pip: ask an unpatched copy.
    import mmengine.utils.package_utils as patched

    spec = importlib.util.spec_from_file_location('a_copy_of_package_utils', patched.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    commands: list[list[str]] = []
    copy.call_command = commands.append
    copy.install_package('a-package-that-does-not-exist')
    assert commands[0][-3:] == ['pip', 'install', 'a-package-that-does-not-exist']
    lineage.refuse_installs(copy)
    with pytest.raises(UserError, match=r"'a-package-that-does-not-exist' is not installed.*Install it yourself"):
        copy.install_package('a-package-that-does-not-exist')
    copy.install_package('pytest')  # what is there needs no installation


def only(*names: str) -> Callable[[str], object]:
    def distribution(name: str) -> object:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return object()

    return distribution


@pytest.mark.parametrize(
    ('installed', 'importable', 'expected'),
    [
        (['mmsegmentation'], True, 'mmsegmentation'),
        (['onedl-mmsegmentation'], True, 'onedl-mmsegmentation'),
        ([], True, 'mmseg'),
        ([], False, 'mmsegmentation'),
    ],
    ids=['classic', 'onedl', 'checkout', 'none'],
)
def test_the_installed_distribution_is_named(
    installed: list[str], importable: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, 'distribution', only(*installed))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object() if importable else None)
    module = SimpleNamespace(MODULE2PACKAGE={'mmseg': 'mmsegmentation', 'mmdet': 'mmdet'})
    lineage.name_what_is_installed(module)
    assert sorted(module.MODULE2PACKAGE.items()) == sorted({'mmseg': expected, 'mmdet': 'mmdet'}.items())


@pytest.mark.parametrize('installed', ['mmpretrain', 'onedl-mmpretrain'])
def test_mmpretrain_is_named_too(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, 'distribution', only(installed))
    module = SimpleNamespace(MODULE2PACKAGE={'mmpretrain': 'mmpretrain'})
    lineage.name_what_is_installed(module)
    assert module.MODULE2PACKAGE['mmpretrain'] == installed


def test_other_modules_are_left_to_the_other_finders() -> None:
    ours = import_hook.PatchFinder()
    for name in ('mmengine', 'mmengine.config', 'mmengine.utils', 'mmcv._ext', 'torch'):
        assert ours.find_spec(name) is None
