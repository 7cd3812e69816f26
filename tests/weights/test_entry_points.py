"""After a bare ``import mila_mm``, no reader of checkpoints in OpenMMLab runs what a stranger wrote into one."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name('entry_points.py')
ROOT = SCRIPT.parents[2]
CONFIG = 'model = dict(type="ResNet", depth=18)\nimport os\nos.mkdir({canary!r})\n'
# Data alone: mmengine looks the type of a model up as the name of any function.
DATA_ONLY = 'model = dict(type="os.mkdir", path={canary!r})\n'


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def weights() -> OrderedDict:
    return OrderedDict(weight=torch.ones(2, 2), bias=torch.ones(2))


def hostile(canary: str) -> dict[str, Callable[[Path], None]]:
    """Return writers of 14 files by name: those that 'pickle' runs, those whose text a program would run."""
    make = Call(os.mkdir, canary)
    code = f'import os; os.mkdir({canary!r})'

    def bare(path: Path) -> None:
        path.write_bytes(pickle.dumps({'state_dict': {'a': make}}, protocol=2))

    def saved(content: object, **options: object) -> Callable[[Path], None]:
        return lambda path: torch.save(content, path, **options)

    return {
        'pickle at the top': saved(make),
        'pickle as a weight': saved({'state_dict': {**weights(), 'c': make}}),
        'pickle as a key': saved({'state_dict': weights(), (make, 1): 2}),
        'pickle in the optimizer': saved({'state_dict': weights(), 'optimizer': {'state': {0: [make]}}}),
        'pickle in the meta data': saved({'state_dict': weights(), 'meta': {'hook_msgs': (make, 1)}}),
        'pickle of exec': saved({'state_dict': weights(), 'meta': Call(exec, code)}),
        'pickle of a pickle': saved({'state_dict': weights(), 'meta': Call(pickle.loads, pickle.dumps(make))}),
        'pickle in the legacy format': saved({'state_dict': {'a': make}}, _use_new_zipfile_serialization=False),
        'pickle of protocol 4': saved({'state_dict': {'a': make}}, pickle_protocol=4),
        'pickle without torch': bare,
        'config in meta cfg': saved({'state_dict': weights(), 'meta': {'cfg': CONFIG.format(canary=canary)}}),
        'config in meta config': saved(
            {'state_dict': weights(), 'meta': {'epoch': 1, 'iter': 1, 'config': CONFIG.format(canary=canary)}}
        ),
        'config in the message hub': saved(
            {
                'state_dict': weights(),
                'meta': {},
                'message_hub': {'runtime_info': {'cfg': CONFIG.format(canary=canary)}},
            }
        ),
        'config of data alone': saved(
            {'state_dict': weights(), 'meta': {'cfg': DATA_ONLY.format(canary=canary)}},
        ),
    }


@pytest.fixture(scope='module')
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('strangers')
    for name, write in hostile(str(folder / 'executed')).items():
        write(folder / f'{name.replace(" ", "-")}.pth')
    return folder


def outcomes(imports: str, folder: Path) -> dict[str, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), imports, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'NO_PROXY': '*', 'OMP_NUM_THREADS': '1'},
        cwd=folder,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


# the download refuses what is no checkpoint at all, an inferencer without a model refuses before it reads
REFUSED = re.compile(r'refused: ((Unsafe)?Checkpoint|Download|User)Error')
MUST = {
    *(
        'load_checkpoint',
        '_load_checkpoint',
        'CheckpointLoader',
        'load_from_local',
        'over http',
        'load_url',
        'init_cfg',
    ),
    *('Runner.load_checkpoint', 'Runner.resume'),
}
WITH_MODELS = {
    *('DetInferencer', 'DetInferencer without a model', 'MMSegInferencer', 'MMSegInferencer without a model'),
    *('init_detector', 'init_model', 'init_cfg of a backbone'),
}


def check(found: dict[str, dict[str, str]], expected: set[str]) -> None:
    assert expected <= set(found)
    executed = {(way, file) for way, files in found.items() for file, what in files.items() if what == 'EXECUTED'}
    assert not executed
    for way, said in found.items():
        assert len(said) >= 12
        pickles = {name: what for name, what in said.items() if name.startswith('pickle')}
        assert all(REFUSED.match(what) for what in pickles.values()), (way, pickles)
        if 'without a model' in way:
            assert all('model=CONFIG' in said[name] for name in said if name.startswith('config'))


def test_nothing_executes_after_a_bare_import(files: Path) -> None:
    check(outcomes('mila_mm', files), MUST | WITH_MODELS)


def test_nothing_executes_where_mmengine_came_first(files: Path) -> None:
    imports = 'mmengine.runner,mmengine.infer,mmengine.hub,mmengine.utils.dl_utils,mila_mm'
    check(outcomes(imports, files), MUST)


def test_these_files_do_execute_without_mila_mm(files: Path) -> None:
    """Otherwise the tests above show nothing."""
    found = outcomes('mmengine', files)
    assert found['CheckpointLoader']['pickle-at-the-top'] == 'EXECUTED'
    assert found['Runner.resume']['config-in-meta-config'] == 'EXECUTED'
    canary = files / 'executed'
    for name in hostile(str(canary)):
        if name.startswith('pickle'):
            with suppress(Exception):  # some are no checkpoint, which torch finds out too late
                torch.load(files / f'{name.replace(" ", "-")}.pth', weights_only=False)
            assert canary.exists(), name
            canary.rmdir()
