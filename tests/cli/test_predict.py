"""``mila predict`` as a user types it."""

import json
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mila_mm.cli import command

CONFIG = 'upernet_mila_nano_shapes'


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mmengine.registry import MODELS, init_default_scope

    from mila_mm.engine import load_config

    cfg = load_config(CONFIG)
    init_default_scope('mmseg')
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, path)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'pictures').mkdir()
    for name in ('a.png', 'b.png'):
        cv2.imwrite(f'pictures/{name}', np.zeros((48, 64, 3), np.uint8))

    def run(*words: object) -> tuple[int, str, str]:
        status = command.main(['predict', *map(str, words), '--device', 'cpu'])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_folder(run, checkpoint: Path) -> None:
    status, out, _ = run(CONFIG, checkpoint, 'pictures', '--masks')
    assert status == 0
    assert '2 images in' in out
    assert 'images/s' in out
    assert f'predictions{"/"}pictures  (2)' in out
    assert sorted(path.name for path in Path('predictions/masks').iterdir()) == ['a.png', 'b.png']


def test_unreadable_pictures_are_named_at_the_end(run, checkpoint: Path) -> None:
    Path('pictures/c.png').write_bytes(b'')
    Path('pictures/d.png').write_bytes(b'none')
    status, out, err = run(CONFIG, checkpoint, 'pictures')
    assert status == 2
    assert '2 images in' in out
    assert '2 of 4 could not be read' in err
    assert 'pictures/c.png' in err and 'pictures/d.png' in err
    assert len(list(Path('predictions/pictures').iterdir())) == 2


@pytest.mark.parametrize('unread', [False, True])
@pytest.mark.parametrize(('signum', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_one_line(
    signum: int,
    status: int,
    unread: bool,
    run,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Behind what could not be read until then."""
    if unread:
        Path('pictures/0.png').write_bytes(b'none')

    def second(images, source):
        for index, image in enumerate(images):
            yield image
            if index == 0:
                signal.raise_signal(signum)

    monkeypatch.setattr('mila_mm.cli.predict.show_progress', second)
    with pytest.raises(SystemExit) as ended:
        run(CONFIG, checkpoint, 'pictures', '--json')
    assert ended.value.code == status
    captured = capsys.readouterr()
    assert '1 image in' in captured.out
    lines = captured.err.splitlines()
    assert lines[-1] == 'interrupted; what came before is written'
    assert len(lines) == 1 + unread and ('pictures/0.png' in lines[0]) == unread
    assert [image['file_name'] for image in json.loads(Path('predictions/predictions.json').read_text())['images']] == [
        'a.png'
    ]


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['mask_rcnn_mila_nano_shapes', '{checkpoint}', 'pictures'], 'does not fit'),
        ([CONFIG, 'nowhere.pth', 'pictures'], 'CHECKPOINT: nowhere.pth does not exist'),
        ([CONFIG, '{checkpoint}', '98'], 'camera 98 is not there'),
        ([CONFIG, '{checkpoint}', '.'], 'no picture among 0 files'),
        (['mila_t_in1k', '{checkpoint}', 'pictures'], 'is a classifier'),
        (
            [CONFIG, '{checkpoint}', 'pictures', '--score-thr', '2'],
            'expected a score from 0 to 1, got 2.0',
        ),
        ([CONFIG, '{checkpoint}', 'pictures', '--score-thr', 'nan'], '--score-thr: expected a score from 0 to 1'),
        ([CONFIG, '{checkpoint}', 'pictures', '--limit', '-3'], '--limit: expected a number above 0, got -3'),
        ([CONFIG, '{checkpoint}', 'pictures', '--batch', '0'], '--batch: expected a number above 0, got 0'),
        ([CONFIG, 'nowhere.pth', 'pictures', '--out', '{checkpoint}'], 'is a file, not a folder'),
    ],
)
def test_mistakes(words: list[str], said: str, run, checkpoint: Path) -> None:
    status, _, err = run(*(word.format(checkpoint=checkpoint) for word in words))
    assert (status, said in err) == (2, True), err
    assert 'Traceback' not in err
