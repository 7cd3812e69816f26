"""Downloading one file: resumable, refusing nothing it can continue, never looking whole when it is not.

The bytes go to ``X.part`` (:mod:`mila_mm.weights.source.part`). Only a complete, checked file takes the name ``X``.
Needs the standard library and tqdm.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from mila_mm.errors import printable
from mila_mm.files import open_regular
from mila_mm.version import __version__
from mila_mm.weights.errors import DownloadError
from mila_mm.weights.source.cache import Settings
from mila_mm.weights.source.part import Part

_CHUNK = 1 << 18
_MAX_PAUSE = 8.0
_WINDOW = 60.0  # seconds over which a rate is taken
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO})
_RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_COUNT = '[0-9]{1,18}'
_LOOPBACK = frozenset({'localhost', '127.0.0.1', '::1'})


class SourceError(Exception):
    """One source failed; the message is the cause alone, the caller knows the address."""


class _Retry(SourceError):
    """Worth another try at the same source."""


@dataclass
class _Transfer:
    """One file on its way."""

    part: Part
    settings: Settings
    bar: tqdm
    cancelled: bool = False

    @property
    def source(self) -> str:
        """The address."""
        return self.part.version.source

    def request(self) -> urllib.request.Request:
        """Ask for the whole file, or for the rest of the version that lies on disk."""
        headers = {'User-Agent': f'mila_mm/{__version__}', 'Accept-Encoding': 'identity'}
        if self.part.have:
            headers['Range'] = f'bytes={self.part.have}-'
            validator = self.part.version.validator
            if validator and not validator.startswith('W/'):  # RFC 9110 13.1.5: strong ones only
                headers['If-Range'] = validator
        return urllib.request.Request(self.source, headers=headers)

    def receive(self, response: http.client.HTTPResponse) -> None:
        """Append what a response brings, starting over where the server does so."""
        content_type = response.headers.get('Content-Type', '')
        if content_type.startswith('text/html'):
            raise SourceError('answered with a web page instead of a file; the share link may have expired')
        part, (start, total) = self.part, _extent(response)
        if start != part.have or (start and total is not None and part.version.total not in (None, total)):
            if start:
                part.restart()
                raise _Retry('the server sent another part of the file than was asked for')
            part.restart()
        part.begin(response.headers.get('ETag') or response.headers.get('Last-Modified') or '', total)
        if total is not None:
            self._check_room(start, total)
        self.bar.total, self.bar.n = total, start
        self.bar.refresh()
        self._append_all(response)
        if total is not None and part.have < total:
            raise _Retry(f'the connection ended after {part.have:,} of {total:,} bytes')
        if total is not None and part.have > total:
            size = part.have
            part.restart()
            raise SourceError(f'sent {size:,} bytes where it had announced {total:,}')

    def _check_room(self, start: int, total: int) -> None:
        if total > self.settings.max_bytes:
            raise self._too_much(f'announces {total:,} bytes')
        free = shutil.disk_usage(self.part.path.parent).free
        if total - start > free:
            raise DownloadError(
                f'{self.part.path.parent}: {total - start:,} bytes are needed, the disk has {free:,} free; '
                'make room or set MILA_HOME'
            )

    def _append_all(self, response: http.client.HTTPResponse) -> None:
        window, came = time.monotonic(), 0
        while block := response.read1(_CHUNK):
            if self.cancelled:
                return
            if self.part.have + len(block) > self.settings.max_bytes:
                self.part.restart()
                raise self._too_much('sends more bytes')
            _write(self.part, block)
            self.bar.update(len(block))
            came += len(block)
            seconds = time.monotonic() - window
            if seconds >= _WINDOW:
                if came < self.settings.min_rate * seconds:
                    raise SourceError(
                        f'sent {came:,} bytes in {seconds:.0f} s, less than {self.settings.min_rate:g} a second'
                    )
                window, came = time.monotonic(), 0
        self.part.finish()

    def _too_much(self, what: str) -> SourceError:
        limit = f'{self.settings.max_bytes:,} bytes'
        return SourceError(f'{what}, more than the {limit} that are taken; configure(max_bytes=...) sets the limit')


def _write(part: Part, block: bytes) -> None:
    try:
        part.append(block)
    except OSError as error:
        raise DownloadError(f'{part.path}: cannot write ({error.strerror}); make room or set MILA_HOME') from error


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Return the first byte that a response brings and the size of the whole file, if announced."""
    length = response.headers.get('Content-Length')
    if response.status != http.client.PARTIAL_CONTENT:
        return 0, int(length) if length and re.fullmatch(_COUNT, length) else None
    match = re.fullmatch(rf'bytes ({_COUNT})-{_COUNT}/({_COUNT}|\*)', response.headers.get('Content-Range', '').strip())
    if not match:
        raise SourceError(f'answered 206 with Content-Range {response.headers.get("Content-Range")!r}')
    return int(match[1]), None if match[2] == '*' else int(match[2])


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects over the web, but never from https to something that anyone on the way can change."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Refuse a downgrade; otherwise as urllib does (which keeps the Range header).

        Returns:
            The next request.

        Raises:
            SourceError: If it points from https to anything else, or away from the web.
        """
        scheme, old = urlsplit(newurl).scheme, urlsplit(req.full_url).scheme
        if scheme != 'https' and (scheme != 'http' or old == 'https'):
            raise SourceError(f'redirects from {old} to {printable(newurl, 200)}, which is refused')
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(source: str) -> None:
    """Refuse schemes other than https, and http except to mirrors on this machine or where it is asked for."""
    parts = urlsplit(source)
    if parts.scheme == 'https' or (parts.scheme == 'http' and parts.hostname):
        return
    raise SourceError(f'unknown kind of address {source!r}; expected https://..., http://... or a folder')


def is_plain_http(source: str) -> bool:
    """Tell whether anyone on the way could change what this address sends.

    Returns:
        Whether it is http to another machine.
    """
    parts = urlsplit(source)
    return parts.scheme == 'http' and parts.hostname not in _LOOPBACK


def _try_once(transfer: _Transfer) -> None:
    """Open one connection and take what it brings."""
    opener = urllib.request.build_opener(_Redirects)
    try:
        with opener.open(transfer.request(), timeout=transfer.settings.timeout) as response:
            transfer.receive(response)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and transfer.part.have:
            transfer.part.restart()
            raise _Retry('the server refused to continue the file') from error
        kind = _Retry if error.code in _RETRY_STATUS else SourceError
        raise kind(f'HTTP {error.code} {printable(str(error.reason))}') from error
    except urllib.error.URLError as error:
        raise _Retry(f'no connection ({printable(str(error.reason))})') from error
    except TimeoutError as error:
        raise _Retry(f'no byte for {transfer.settings.timeout:g} s') from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
            raise DownloadError(
                f'{transfer.part.path}: cannot write ({error.strerror}); make room, or set MILA_HOME '
                'to a folder that you may write'
            ) from error
        raise _Retry(f'connection lost ({printable(str(error)) or type(error).__name__})') from error
    except ValueError as error:  # addresses that only the attempt shows to be none, here or in a redirect
        raise SourceError(f'not an address that can be opened ({printable(str(error))})') from error


def _try_until(transfer: _Transfer, end: float) -> None:
    """Try once, and give up at a moment of the monotonic clock, wherever the server then keeps this process waiting.

    A server that sends a byte now and then, of the file, of its headers or of the handshake, never runs into a
    time-out of the socket. So the attempt has a thread of its own, which is left behind.
    """
    outcome: list[BaseException] = []

    def attempt() -> None:
        """Keep what is raised for the thread that waits."""
        try:
            _try_once(transfer)
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    try:
        thread.join(max(end - time.monotonic(), 0))
    finally:
        transfer.cancelled = thread.is_alive()
    if transfer.cancelled:
        raise SourceError(f'not done within the deadline; {transfer.part.have:,} bytes are kept for the next attempt')
    if outcome:
        raise outcome[0]


def download(
    source: str, path: Path, settings: Settings, *, label: str, end: float, progress: bool | None = None
) -> None:
    """Bring a file to ``path``, continuing what lies there from the same source.

    Args:
        source: https or http address, or a file on this machine.
        path: Where the bytes go. What this function leaves there is complete only if it returns.
        label: What the progress bar calls it.
        end: When to give up, on the monotonic clock.
        progress: Whether to show the bar on stderr; ``None`` shows it on terminals.

    Raises:
        SourceError: If the source cannot give the file.
        DownloadError: If this machine cannot take it (disk full, no permission).
    """
    disable = None if progress is None else not progress
    is_address = '://' in source
    if is_address:
        _check_address(source)
    with tqdm(desc=label, unit='B', unit_scale=True, unit_divisor=1024, disable=disable) as bar:
        part = Part(path, source)
        transfer = _Transfer(part, settings, bar)
        try:
            if is_address:
                _keep_trying(transfer, end)
            else:
                _copy(Path(source).expanduser(), transfer)
        finally:
            if not transfer.cancelled:  # else the thread that was left behind would write to whatever is opened next
                part.close()


def _keep_trying(transfer: _Transfer, end: float) -> None:
    # Only more than ever before counts as progress: a server that restarts the file gains again what was there.
    tries, best, settings = 0, transfer.part.have, transfer.settings
    while True:
        tries += 1
        try:
            return _try_until(transfer, end)
        except _Retry as error:
            if transfer.part.have > best:
                tries, best = 0, transfer.part.have
                continue
            if tries >= settings.attempts:
                raise SourceError(f'{error}, {tries} tries') from error
            time.sleep(max(0, min(settings.backoff * 2 ** (tries - 1), _MAX_PAUSE, end - time.monotonic())))


def _copy(source: Path, transfer: _Transfer) -> None:
    """Copy from a mirror that is a folder."""
    part, bar = transfer.part, transfer.bar
    part.restart()
    try:
        with open_regular(source) as reader:
            bar.total = os.fstat(reader.fileno()).st_size
            transfer._check_room(0, bar.total)
            part.begin('', bar.total)
            while block := reader.read(_CHUNK):
                _write(part, block)
                bar.update(len(block))
        part.finish()
    except FileNotFoundError as error:
        raise SourceError('no such file') from error
    except (OSError, ValueError) as error:
        raise SourceError(f'cannot be copied ({getattr(error, "strerror", None) or error})') from error
