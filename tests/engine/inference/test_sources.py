"""Sources of images, sound and broken."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from mila_mm.engine.inference.sources import Video, open_source, read_picture
from mila_mm.errors import UserError


def test_folder(folder: Path) -> None:
    source = open_source(str(folder))
    assert source.total == 4
    assert [(picture.name, picture.image.shape) for picture in source] == [
        ('a.jpg', (48, 64, 3)),
        ('b.png', (40, 56, 3)),
        ('c.bmp', (48, 64, 3)),
    ]
    assert source.failures == [f'{folder / "broken.jpg"}: cannot be read as a picture']


def test_pattern_keeps_the_folders_below_the_common_one(folder: Path) -> None:
    (folder / 'below').mkdir()
    (folder / 'b.png').rename(folder / 'below' / 'a.jpg')
    names = [picture.name for picture in open_source(f'{folder}/**/[ac].*')]
    assert names == ['a.jpg', 'below/a.jpg', 'c.bmp']


def test_picture_is_what_training_reads(folder: Path) -> None:
    from mmcv.transforms import LoadImageFromFile

    expected = LoadImageFromFile()({'img_path': str(folder / 'a.jpg')})['img']
    assert np.array_equal(read_picture(folder / 'a.jpg'), expected)


def test_video(video: Path) -> None:
    source = open_source(str(video))
    assert (source.total, source.fps, source.name) == (8, 10.0, 'clip')
    assert [picture.name for picture in source][:2] == ['clip_000000', 'clip_000001']
    assert source.failures == []


def test_opencv_5_has_its_levels_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    levels = SimpleNamespace(getLogLevel=lambda: 3, setLogLevel=set_to.append)
    monkeypatch.setattr(cv2.utils, 'logging', levels, raising=False)
    for name in ('getLogLevel', 'setLogLevel'):
        monkeypatch.delattr(cv2, name, raising=False)
    (tmp_path / 'broken.mp4').write_bytes(bytes(1000))
    with pytest.raises(UserError, match='cannot be read as a video'):
        Video(str(tmp_path / 'broken.mp4'), 'broken.mp4')
    assert set_to == [0, 3]


def test_an_animated_gif_is_a_video(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((48, 64, 3), 80 * index, np.uint8)) for index in range(3)]
    frames[0].save(tmp_path / 'moving.gif', save_all=True, append_images=frames[1:], duration=100)
    source = open_source(str(tmp_path / 'moving.gif'))
    assert [round(float(picture.image.mean())) for picture in source] == pytest.approx([0, 80, 160], abs=4)
    assert (source.fps, source.failures) == (10.0, [])


@pytest.mark.parametrize('has_av', [True, False], ids=['PyAV', 'OpenCV'])
def test_a_video_that_breaks_off_says_where(has_av: bool, video: Path) -> None:
    if has_av:
        pytest.importorskip('av', reason='PyAV is not installed')
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    source = open_source(str(video)) if has_av else Video(str(video), str(video))
    source.total = source.total or 8  # the cut file may have lost its count
    frames = len(list(source))
    assert 0 < frames < 6
    assert source.failures == [f'{video}: broke off after {frames} of {source.total} frames']


@pytest.mark.parametrize(
    ('make', 'said'),
    [
        (lambda tmp: '987', 'camera 987 is not there or in use'),
        (lambda tmp: str(tmp / 'nowhere.jpg'), 'does not exist'),
        (lambda tmp: str(tmp / 'nothing*.jpg'), 'no picture among 0 files'),
        (lambda tmp: _file(tmp / 'text.txt'), 'expected a picture'),
        (lambda tmp: _file(tmp / 'clip.mp4'), 'cannot be read as a video'),
        (lambda tmp: str(Path(_file(tmp / 'only' / 'clip.mp4')).parent), 'no picture among 1 files'),
    ],
    ids=['camera', 'missing', 'pattern', 'text', 'damaged video', 'folder without pictures'],
)
def test_what_cannot_be_opened_is_one_message(make, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        open_source(make(tmp_path))


def _file(path: Path) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'nothing of use')
    return str(path)
