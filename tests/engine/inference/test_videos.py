"""Video files that are damaged, turned, or of several formats, read with PyAV."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from mila_mm.engine.inference.sources import Video, VideoFile, open_source
from mila_mm.errors import UserError

av = pytest.importorskip('av', reason='PyAV is not installed')

FRAMES = 24


@pytest.fixture
def write(tmp_path: Path):
    """Write frames of a picture that moves; a frame in twelve is complete, the others continue it."""

    def write(name: str, codec: str = 'mpeg4', **options: str) -> Path:
        path = tmp_path / name
        base = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
        base = cv2.resize(base, (160, 128), interpolation=cv2.INTER_CUBIC)
        with av.open(str(path), 'w', options=options) as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 160, 128, 'yuv420p'
            for index in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(np.roll(base, 4 * index, axis=1), format='bgr24')
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


def packets(path: Path) -> list[tuple[int, int]]:
    """Return where each frame lies in a file, and how long it is."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def spoil(path: Path, frames: range, value: int | None) -> None:
    """Overwrite frames in a file; with None turn a few bits in the middle of each."""
    data = bytearray(path.read_bytes())
    for start, size in packets(path)[frames.start : frames.stop]:
        for index in range(start, start + size) if value is not None else range(start + size // 2, start + size, 9):
            data[index] = value if value is not None else data[index] ^ 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize('name', ['clip.mp4', 'clip.avi', 'clip.mkv', 'clip.mov'])
def test_sound_files_are_read_whole_and_as_opencv_reads_them(name: str, write) -> None:
    path = write(name)
    source = open_source(str(path))
    assert isinstance(source, VideoFile)
    assert (source.total, source.fps, source.name) == (FRAMES, 10.0, 'clip')
    ours, theirs = [each.image for each in source], [each.image for each in Video(str(path), str(path))]
    assert source.failures == []
    assert len(ours) == len(theirs) == FRAMES
    # the two round colours in their own ways
    assert max(float(np.abs(a.astype(int) - b).mean()) for a, b in zip(ours, theirs, strict=True)) < 4


def test_frames_that_cannot_be_decoded_are_counted_and_those_after_them_shown(write) -> None:
    path = write('clip.mp4')
    spoil(path, range(5, 8), 0)
    source = open_source(str(path))
    shown = [picture.name for picture in source]
    assert shown == [f'clip_{index:06d}' for index in (*range(5), *range(8, FRAMES))]
    assert source.failures == [f'{path}: of {FRAMES} frames 3 cannot be decoded; from frame 5 on (0.5 s)']


def test_a_frame_that_is_damaged_but_decodes_is_told(write) -> None:
    path = write('clip.mp4')
    spoil(path, range(12, 13), None)
    source = open_source(str(path))
    assert len(list(source)) == FRAMES
    assert len(source.failures) == 1
    assert source.failures[0].startswith(f'{path}: of {FRAMES} frames ')
    assert source.failures[0].endswith('damaged but shown; from frame 12 on (1.2 s)')


def test_a_file_cut_in_the_middle(write) -> None:
    path = write('clip.mp4', movflags='faststart')  # the index comes first, and names frames that are not there
    path.write_bytes(path.read_bytes()[: sum(packets(path)[10])])
    source = open_source(str(path))
    assert len(list(source)) == 11
    assert source.failures == [f'{path}: broke off after 11 of {FRAMES} frames']
    late = write('late.mp4')
    late.write_bytes(late.read_bytes()[: late.stat().st_size // 2])
    with pytest.raises(UserError, match=r'late\.mp4 cannot be read as a video'):
        open_source(str(late))


def test_sound_longer_than_the_pictures_and_a_rate_that_changes_are_no_damage(tmp_path: Path) -> None:
    path = tmp_path / 'clip.mkv'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mpeg4', rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 128, 'yuv420p'
        sound = container.add_stream('aac', rate=44100)
        for index in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((128, 160, 3), 20 * index, np.uint8), format='bgr24')
            frame.pts = index if index < 5 else 4 * index
            container.mux(stream.encode(frame))
        for index in range(300):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format='fltp', layout='stereo')
            frame.sample_rate, frame.pts = 44100, 1024 * index
            container.mux(sound.encode(frame))
        container.mux([*stream.encode(), *sound.encode()])
    for source in (open_source(str(path)), Video(str(path), str(path))):
        assert len(list(source)) == 10
        assert source.failures == []


def test_a_cut_file_of_a_format_that_does_not_count(write) -> None:
    path = write('clip.webm', 'libvpx')
    assert len(list(open_source(str(path)))) == FRAMES
    assert open_source(str(path)).failures == []
    path.write_bytes(path.read_bytes()[: sum(packets(path)[2])])
    source = open_source(str(path))
    assert len(list(source)) == 2
    assert source.failures == [f'{path}: broke off after 2 frames, at 0.1 of 2.4 s']


@pytest.mark.parametrize('fault', ['text', 'sound'])
def test_a_file_without_a_video(fault: str, tmp_path: Path) -> None:
    path = tmp_path / 'clip.mp4'
    path.write_bytes(b'nothing of use')
    if fault == 'sound':
        with av.open(str(path), 'w') as container:
            stream = container.add_stream('aac', rate=44100)
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format='fltp', layout='stereo')
            frame.sample_rate = 44100
            container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(UserError, match='cannot be read as a video'):
        open_source(str(path))


def test_a_file_that_a_phone_has_trimmed_is_whole(write) -> None:
    """Its frames are all there, and a list of edits says which are shown: here those from 1.2 s on, for a second."""
    path = write('clip.mp4')
    data = bytearray(path.read_bytes())
    edits, movie, media = (data.index(name) for name in (b'elst', b'mvhd', b'mdhd'))
    ticks, media_ticks = (struct.unpack_from('>I', data, place + 16)[0] for place in (movie, media))
    struct.pack_into('>Ii', data, edits + 12, ticks, round(1.2 * media_ticks))
    struct.pack_into('>I', data, movie + 20, ticks)
    path.write_bytes(data)
    source = open_source(str(path))
    assert (source.total, len(list(source))) == (10, 10)
    assert source.failures == []


UPRIGHT = struct.pack('>9i', 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize('turn', [90, 180, 270])
def test_a_file_of_a_turned_camera_is_read_as_opencv_reads_it(turn: int, write) -> None:
    path = write('clip.mp4')
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[turn]
    matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    data = path.read_bytes()
    start = data.index(UPRIGHT, data.index(b'tkhd'))
    path.write_bytes(data[:start] + struct.pack('>9i', *matrix) + data[start + len(UPRIGHT) :])
    ours = next(iter(open_source(str(path)))).image
    theirs = next(iter(Video(str(path), str(path)))).image
    assert ours.shape == theirs.shape == ((128, 160, 3) if turn == 180 else (160, 128, 3))
    assert float(np.abs(ours.astype(int) - theirs).mean()) < 4
