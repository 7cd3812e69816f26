"""What happens to a config before its runner is built."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model.weight_init import PretrainedInit

from mila_mm.engine import testing, training
from mila_mm.engine.config import prepare
from mila_mm.engine.config.prepare import configure_weights, fetch_weights
from mila_mm.errors import UserError
from mila_mm.weights.source import cache, fetching

NAMES = ('tiny-in1k', 'small-in1k', 'mask-rcnn-tiny-1x')


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a mirror that holds published files."""
    mirror = tmp_path / 'mirror'
    mirror.mkdir()
    for name in NAMES:
        torch.save({'model': {'a': torch.ones(1)}}, mirror / f'mila-{name}.pth')
    monkeypatch.setattr(cache._Configured, 'settings', cache.Settings())
    monkeypatch.setenv('MILA_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('MILA_MIRRORS', str(mirror))
    return tmp_path / 'home'


def fetched(home: Path) -> set[str]:
    return {path.stem.removeprefix('mila-') for path in home.glob('*.pth')}


def pretrained(name: str, kind: object = 'Pretrained') -> dict:
    return dict(init_cfg=dict(type=kind, checkpoint=name))


def test_what_a_config_names_anywhere_is_fetched(home) -> None:
    model = dict(
        backbone=pretrained(f'mila://{NAMES[0]}'),
        heads=[
            pretrained(f'mila://{NAMES[1]}', PretrainedInit),
            pretrained('a/local/file.pth'),
            pretrained('s3://a/b'),
        ],
        other=dict(init_cfg=[dict(type='Normal', layer='Conv2d'), dict(type='Constant', checkpoint='mila://none')]),
    )
    fetch_weights(Config(dict(model=model, load_from=f'mila://{NAMES[2]}')), model)
    assert fetched(home) == set(NAMES)


def test_an_address_of_a_published_file_has_one_place(home) -> None:
    fetch_weights(Config(dict(load_from=fetching.find(NAMES[0]).url)))
    assert fetched(home) == {NAMES[0]}


def test_an_unknown_name_is_an_error_at_once(home) -> None:
    with pytest.raises(UserError, match='no published weights'):
        fetch_weights(Config(dict(load_from='mila://nothing')))
    with pytest.raises(UserError, match='no such model in that zoo'):
        fetch_weights(Config({}), pretrained('torchvision://nothing'))


class Joined(Exception):
    """The processes of the job are about to join."""


@pytest.mark.parametrize('stage', ['train', 'test'])
def test_weights_are_here_before_the_processes_join(home, tmp_path, monkeypatch, stage) -> None:
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmdet'\n"
        "model = dict(type='X', backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mila://tiny-in1k')))\n"
        'train_dataloader = test_dataloader = dict(batch_size=1)\n'
        'train_cfg = dict(max_iters=1)\n'
        "optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))\n"
        "test_cfg, test_evaluator = dict(), dict(type='X')\n"
    )

    def join(*_: object, **__: object) -> None:
        raise Joined

    for module in (training, testing):
        monkeypatch.setattr(module, 'prepare_launch', join)
    options = dict(work_dir=str(tmp_path / 'work'), launcher='pytorch')
    with pytest.raises(Joined):
        if stage == 'train':
            training.train(str(config), **options)
        else:
            testing.test(str(config), 'mila://tiny-in1k', **options)
    assert fetched(home) == {NAMES[0]}


def test_processes_of_a_machine_download_once(home, monkeypatch) -> None:
    """Here threads, for which the lock holds as well."""
    started, download = [], fetching.download

    def counted(*args: object, **kwargs: object) -> None:
        started.append(args)
        download(*args, **kwargs)

    monkeypatch.setattr(fetching, 'download', counted)
    threads = [
        threading.Thread(target=prepare.fetch_weights, args=(Config(dict(load_from='mila://tiny-in1k')),))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1 and fetched(home) == {NAMES[0]}


def test_limits_of_downloads_in_a_config(home) -> None:
    configure_weights(Config(dict(mila_weights=dict(max_bytes=10, deadline=5.0, min_rate=0))))
    with pytest.raises(UserError, match='more than the 10 bytes that are taken'):
        fetch_weights(Config(dict(load_from='mila://tiny-in1k', mila_weights=dict(offline=False))))
    with pytest.raises(UserError, match=r'mila_weights: .*expected some of mirrors, .*max_bytes, min_rate, deadline'):
        configure_weights(Config(dict(mila_weights=dict(speed=3))))
    with pytest.raises(UserError, match='deadline: expected a number'):
        configure_weights(Config(dict(mila_weights=dict(deadline='soon'))))


def test_folders_are_checked_before_anything_is_fetched(home, tmp_path) -> None:
    (tmp_path / 'file').touch()
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmdet'\n"
        "model = dict(type='X', backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mila://tiny-in1k')))\n"
        'train_dataloader = dict(batch_size=1)\n'
        'train_cfg = dict(max_iters=1)\n'
        "optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))\n"
    )
    with pytest.raises(UserError, match=r'--work-dir .* is a file, not a folder'):
        training.train(str(config), work_dir=str(tmp_path / 'file/run'))
    out_dir = f'default_hooks.checkpoint.out_dir={tmp_path}/file'
    with pytest.raises(UserError, match=r'default_hooks\.checkpoint\.out_dir .* is a file'):
        training.train(str(config), work_dir=str(tmp_path / 'run'), cfg_options=[out_dir])
    assert not home.exists() or not fetched(home)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('link', 'a link that leads nowhere'),
        ('link/run', 'a link that leads nowhere'),
        ('x' * 300, 'expected a name of at most 255 bytes|File name too long'),
        ('run/' + 'x' * 300, 'expected a name of at most 255 bytes'),
        ('run/' + 'y/' * 3000, 'expected a name of at most|File name too long'),
        ('circle', 'a link that leads nowhere|symbolic links'),
        ('circle/run', 'a link that leads nowhere|symbolic links'),
        ('a\0b', 'cannot be a folder'),
    ],
)
def test_a_name_that_can_be_no_folder(tmp_path, name, words) -> None:
    (tmp_path / 'link').symlink_to(tmp_path / 'nothing')
    (tmp_path / 'circle').symlink_to(tmp_path / 'circle')
    for options in (dict(work_dir=f'{tmp_path}/{name}'), dict(work_dir=str(tmp_path), out_dir=f'{tmp_path}/{name}')):
        hooks = dict(checkpoint=dict(out_dir=options.pop('out_dir', None)))
        with pytest.raises(UserError, match=words) as caught:
            prepare.check_folders(Config(dict(options, default_hooks=hooks)))
        assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_an_address_of_a_local_folder_is_one(tmp_path) -> None:
    cfg = Config(dict(work_dir=str(tmp_path), default_hooks=dict(checkpoint=dict(out_dir=f'file://{tmp_path}/a%20b'))))
    prepare.check_folders(cfg)
    assert cfg.default_hooks.checkpoint.out_dir == f'{tmp_path}/a b'


def test_a_home_folder_is_found(tmp_path, monkeypatch) -> None:
    """A shell leaves the ~ in --work-dir=~/run and in a config as it is."""
    monkeypatch.setenv('HOME', str(tmp_path))
    cfg = Config(dict(default_hooks=dict(checkpoint=dict(out_dir='~/out'))))
    prepare.set_work_dir(cfg, '~/run')
    prepare.check_folders(cfg)
    assert cfg.work_dir == f'{tmp_path}/run' and cfg.default_hooks.checkpoint.out_dir == f'{tmp_path}/out'
    cfg = Config(dict(work_dir='~/other'))
    prepare.set_work_dir(cfg, None)
    assert cfg.work_dir == f'{tmp_path}/other'


def test_a_disk_without_room_is_said_before_it_is_needed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, 'No space left on device')))
    with pytest.raises(UserError, match='No space left on device'):
        prepare.check_folders(Config(dict(work_dir=str(tmp_path / 'run'))))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('loader', 'expected'), [({}, False), ({'drop_last': True}, True), ({'drop_last': False}, False)]
)
def test_the_last_batch_is_dropped_where_the_config_says_so(loader, expected) -> None:
    loader = {'sampler': {'type': 'DefaultSampler'}, **loader}
    prepare._use_sampler(loader)
    assert loader['batch_sampler']['drop_last'] is expected
    assert 'drop_last' not in loader, 'PyTorch takes it of one of the two'
