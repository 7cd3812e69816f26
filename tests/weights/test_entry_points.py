"""After a bare ``import mila_mm``, no reader of checkpoints in OpenMMLab runs what a stranger wrote into one."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
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
    """Return writers of 22 files by name: those that 'pickle' runs, those whose text a program would run, and others.

    The others are of forms that a reader may pass on to one that runs code.
    """
    make = Call(os.mkdir, canary)
    code = f'import os; os.mkdir({canary!r})'

    def bare(path: Path) -> None:
        path.write_bytes(pickle.dumps({'state_dict': {'a': make}}, protocol=2))

    def saved(content: object, **options: object) -> Callable[[Path], None]:
        return lambda path: torch.save(content, path, **options)

    def tar(path: Path) -> None:
        with tarfile.open(path, 'w') as archive:
            for name in ('storages', 'tensors', 'pickle'):
                data = pickle.dumps(make, protocol=2)
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))

    def nested(path: Path) -> None:
        torch.save({'state_dict': weights()}, path)
        with zipfile.ZipFile(path, 'a', zipfile.ZIP_STORED) as archive:
            archive.writestr(f'{path.stem}/inner/data.pkl', pickle.dumps(make, protocol=2))

    def in_the_place_of_a_tensor(path: Path) -> None:
        torch.save({'state_dict': weights()}, path)
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        records[f'{path.stem}/data/0'] = pickle.dumps(make, protocol=2)
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
            for name, data in records.items():
                archive.writestr(name, data)

    def long_header(path: Path) -> None:
        path.write_bytes(struct.pack('<Q', 2**60) + b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}')

    def script(path: Path) -> None:
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
            for name, content in (('data', make), ('constants', ())):
                archive.writestr(f'{path.stem}/{name}.pkl', pickle.dumps(content, protocol=2))
            archive.writestr(f'{path.stem}/code/__torch__.py', code)
            archive.writestr(f'{path.stem}/version', '3')

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
        'pickle of os.system': saved({'state_dict': weights(), 'meta': Call(os.system, f'mkdir {canary}')}),
        'pickle of eval': saved({'state_dict': weights(), 'meta': Call(eval, f'__import__("os").mkdir({canary!r})')}),
        'pickle of a partial': saved({'state_dict': weights(), 'meta': Call(partial(os.mkdir, canary))}),
        'pickle in a tar': tar,
        'program as a TorchScript archive': script,
        'archive with a pickle inside': nested,
        'archive with a pickle for a tensor': in_the_place_of_a_tensor,
        'safetensors with a long header': long_header,
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
READ = re.compile(r'read$|refused: (AssertionError: backbone\. is not in|KeyError: .PackInputs is not in)')
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
        assert len(said) >= 22
        pickles = {name: what for name, what in said.items() if name.startswith(('pickle', 'program', 'safetensors'))}
        assert all(REFUSED.match(what) for what in pickles.values()), (way, pickles)
        # and it did get as far as the files: what holds weights is read, whatever else is made of it later
        assert 'without a model' in way or READ.match(said['config-in-meta-config']), (way, said)
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
