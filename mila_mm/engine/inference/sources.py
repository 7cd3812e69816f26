"""Where images to predict on come from: pictures, folders, glob patterns, videos, cameras."""

import glob
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np

from mila_mm.engine.config.load import one_line
from mila_mm.errors import UserError

PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
# a GIF mostly moves, and one that does not is a video of one frame
VIDEOS = ('.mp4', '.avi', '.mkv', '.mov', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv', '.gif')
_COUNTED = ('.mp4', '.m4v', '.mov', '.avi')
_STREAMS = ('rtsp://', 'rtmp://', 'http://', 'https://')
_PATTERN = frozenset('*?[')
# The number of frames in a video's header is often off by one or two.
_MISCOUNTED = 2


@dataclass(frozen=True)
class Picture:
    """An image to predict on.

    Attributes:
        name: Path for what is written about it, relative, with the suffix of the picture or without one.
        image: (H, W, 3) uint8, BGR.
        origin: The file, for messages and in JSON; of a frame the name alone.
    """

    name: str
    image: np.ndarray
    origin: str


class Source:
    """Images one after the other.

    Attributes:
        total: How many there are; None where nobody can know.
        fps: Frames per second of a video or a camera; None for pictures.
        name: Name for a video that is written of them, without suffix.
        failures: One line for each that could not be read; grows while iterating.
    """

    def __init__(self, name: str, total: int | None, fps: float | None) -> None:
        self.name, self.total, self.fps = name, total, fps
        self.failures: list[str] = []

    def __iter__(self) -> Iterator[Picture]:
        raise NotImplementedError


class Pictures(Source):
    """Picture files; one that cannot be read is told in ``failures`` and left out.

    Args:
        paths: The files.
        root: Folder that names are relative to.
    """

    def __init__(self, paths: list[Path], root: Path) -> None:
        super().__init__(root.name, len(paths), None)
        self.paths, self.root = paths, root

    def __iter__(self) -> Iterator[Picture]:
        for path in self.paths:
            try:
                image = read_picture(path)
            except UserError as error:
                self.failures.append(str(error))
                continue
            yield Picture(path.relative_to(self.root).as_posix(), image, str(path))


class Video(Source):
    """Frames of a camera, a stream or, where PyAV is not installed, of a video file, read with OpenCV.

    OpenCV tells neither that a frame is damaged nor why no more come: a file is held against the number in its header.

    Args:
        where: File, number of a camera, or address of a stream.
        name: What messages call it.

    Raises:
        UserError: If it cannot be opened, or has no frame.
    """

    def __init__(self, where: str | int, name: str) -> None:
        with _quiet_opencv():
            self.capture = cv2.VideoCapture(where)
        self.where, self.is_file = name, isinstance(where, str) and not where.startswith(_STREAMS)
        if not self.capture.isOpened():
            if isinstance(where, int):
                raise UserError(f'camera {where} is not there or in use; 0 is the first one, /dev/video* lists them')
            what = 'cannot be read as a video: damaged, or of an unknown format' if self.is_file else 'does not answer'
            raise UserError(f'{name} {what}')
        count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)) if self.is_file else 0
        # Other formats do not count, and OpenCV then makes a number of the time of what may be longer, the sound.
        self._counted = Path(name).suffix.lower() in _COUNTED
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        super().__init__(
            Path(name).stem if self.is_file else 'camera', count if count > 0 else None, fps if 0 < fps < 1000 else 25.0
        )

    def __iter__(self) -> Iterator[Picture]:
        index = 0
        try:
            while True:
                with _quiet_opencv():
                    there, image = self.capture.read()
                if not there:
                    break
                yield Picture(f'{self.name}_{index:06d}', image, f'{self.name}_{index:06d}')
                index += 1
        finally:
            self.capture.release()
        if not self.is_file:
            self.failures.append(f'{self.where}: no more frames came after {index}')
        elif index == 0:
            self.failures.append(f'{self.where}: holds no frame that can be read')
        elif self._counted and self.total is not None and index < self.total - _MISCOUNTED:
            self.failures.append(f'{self.where}: broke off after {index} of {self.total} frames')


class VideoFile(Source):
    """Frames of a video file, read with PyAV, which goes on after damage and tells where it is.

    Args:
        where: The file.

    Raises:
        UserError: If it cannot be opened, or holds no video.
    """

    def __init__(self, where: str) -> None:
        import av

        self.where = where
        try:
            self._container = av.open(where)
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError) as error:
            raise UserError(f'{where} cannot be read as a video: damaged, or of an unknown format') from error
        rate = float(self._stream.average_rate or 0)
        self._counted: int | None = self._stream.frames or None
        whole = self._container.duration / av.time_base if self._container.duration else 0.0
        if self._counted and 'mp4' in self._container.format.name and self._stream.duration:
            # A trimmed file still holds the frames that it does not show.
            self._counted = min(self._counted, round(self._stream.duration * self._stream.time_base * rate))
        # Matroska and its kind do not count; sound may be longer than the pictures, and the rate be no constant.
        self._seconds = whole if not self._counted and len(self._container.streams) == 1 else None
        total = self._counted or round(whole * rate)
        super().__init__(Path(where).stem, total if total > 0 else None, rate if 0 < rate < 1000 else 25.0)

    def __iter__(self) -> Iterator[Picture]:
        damage = _Damage(self.fps or 25.0)
        with self._container:
            for frame in self._frames(damage):
                name = f'{self.name}_{damage.shown + damage.lost:06d}'  # the file's own number
                yield Picture(name, _upright(frame), name)
                damage.see(frame)
        if not damage.shown:
            self.failures.append(f'{self.where}: holds no frame that can be read')
        elif told := damage.told(self._counted) or damage.ended_early(self._seconds):
            self.failures.append(f'{self.where}: {told}')

    def _frames(self, damage: '_Damage') -> Iterator[Any]:
        import av

        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    return
                damage.packets += packet.size > 0  # the last one is empty, and asks for the frames held back
                frames = packet.decode()
            except av.FFmpegError:
                damage.lose()
                continue
            yield from frames


class _Damage:
    """What is wrong with a video: frames that no decoder takes, that are not there, or that are shown as they are."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.shown = self.packets = self.lost = self.damaged = 0
        self.first: int | None = None
        self._gap: int | None = None
        self._time: float | None = None
        self._longest = 0.0

    def lose(self) -> None:
        """Note a frame that cannot be decoded."""
        self.lost += 1
        self._note()

    def see(self, frame: Any) -> None:
        """Note a frame that was shown."""
        if frame.is_corrupt:
            self.damaged += 1
            self._note()
        if frame.time is not None and self._time is not None:
            self._longest = max(self._longest, frame.time - self._time)
            if (frame.time - self._time) * self.fps > 1.5:
                self._gap = self.shown if self._gap is None else self._gap
        self._time = frame.time
        self.shown += 1

    def told(self, total: int | None) -> str:
        """Return what is wrong in one line, empty where nothing is.

        Args:
            total: Frames that the file should hold; None where it does not say.
        """
        missing = total - self.packets if total is not None and self.packets < total - _MISCOUNTED else 0
        if missing and not self.lost and not self.damaged and self._gap is None:
            return f'broke off after {self.shown} of {total} frames'
        if missing and self.first is None:
            self.first = self._gap
        counts = {'cannot be decoded': self.lost, 'not there': missing, 'damaged but shown': self.damaged}
        found = [f'{count} {what}' for what, count in counts.items() if count]
        if not found:
            return ''
        assert self.first is not None
        frames = f'of {total} frames' if total else 'frames:'
        return f'{frames} {", ".join(found)}; from frame {self.first} on ({self.first / self.fps:.1f} s)'

    def ended_early(self, seconds: float | None) -> str:
        """Return in one line that the frames end long before the file's time, empty where they do not.

        Args:
            seconds: How long the frames should last; None where the file does not say.
        """
        if seconds is None or self._time is None or seconds - self._time < max(2.0, 10 * self._longest):
            return ''
        return f'broke off after {self.shown} frames, at {self._time:.1f} of {seconds:.1f} s'

    def _note(self) -> None:
        self.first = self.shown if self.first is None else self.first


def _upright(frame: Any) -> np.ndarray:
    """Return a frame as (H, W, 3) uint8, BGR, turned as its file says, as OpenCV does."""
    image = frame.to_ndarray(format='bgr24')
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


def read_picture(path: str | Path) -> np.ndarray:
    """Read a picture as training does: (H, W, 3) uint8, BGR, turned as its EXIF data say.

    Raises:
        UserError: If it is not there or cannot be read.
    """
    try:
        image = mmcv.imfrombytes(Path(path).read_bytes(), flag='color')
    except OSError as error:
        raise UserError(f'{path}: {error.strerror or one_line(error)}') from error
    except (cv2.error, ValueError) as error:
        raise UserError(f'{path}: cannot be read as a picture') from error
    if image is None:
        raise UserError(f'{path}: cannot be read as a picture')
    return image


def open_source(source: str) -> Source:
    """Open what a user named.

    Args:
        source: A picture, a folder of pictures, a glob pattern (``'**'`` goes into folders), a video, the number of a
            camera, or the address of a stream.

    Raises:
        UserError: If it is not there, cannot be opened, or holds no picture.
    """
    if source.isdecimal():
        return Video(int(source), f'camera {source}')
    if source.startswith(_STREAMS):
        return Video(source, source)
    path = Path(source).expanduser()
    if path.is_dir():
        return Pictures(_pictures_among([entry for entry in path.iterdir() if entry.is_file()], source), path)
    if path.is_file():
        if path.suffix.lower() in VIDEOS:
            return VideoFile(str(path)) if importlib.util.find_spec('av') else Video(str(path), source)
        if path.suffix.lower() not in PICTURES:
            kinds = f'a picture ({" ".join(PICTURES)}), a video ({" ".join(VIDEOS)})'
            raise UserError(f'{source}: expected {kinds}, a folder or a pattern')
        return Pictures([path], path.parent)
    if _PATTERN & set(source):
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        paths = _pictures_among(found, source)
        return Pictures(paths, Path(os.path.commonpath([each.parent for each in paths])))
    raise UserError(f'{source} does not exist (looked in {Path.cwd()})')


def _pictures_among(paths: list[Path], source: str) -> list[Path]:
    found = sorted(path for path in paths if path.suffix.lower() in PICTURES)
    if not found:
        videos = sum(path.suffix.lower() in VIDEOS for path in paths)
        others = f'; {videos} of them are videos: name one' if videos else ''
        raise UserError(f'{source}: no picture among {len(paths)} files (expected {" ".join(PICTURES)}){others}')
    return found


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Keep OpenCV's and ffmpeg's lines off the screen: what is wrong is said in ours."""
    os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
    levels = getattr(cv2.utils, 'logging', cv2)  # there since OpenCV 5
    before = levels.getLogLevel()
    levels.setLogLevel(0)
    try:
        yield
    finally:
        levels.setLogLevel(before)
