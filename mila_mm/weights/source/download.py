"""Downloading one file: resumable, refusing nothing it can continue, never looking whole when it is not.

The bytes go to ``X.part``; ``X.part.json`` says which address and version they belong to. Only a
complete, checked file takes the name ``X``. Needs the standard library and tqdm.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from mila_mm.errors import printable
from mila_mm.version import __version__
from mila_mm.weights.errors import DownloadError
from mila_mm.weights.source.cache import Settings

_CHUNK = 1 << 18
_MAX_PAUSE = 8.0
_DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO})
_RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_COUNT = '[0-9]{1,18}'
_LOOPBACK = frozenset({'localhost', '127.0.0.1', '::1'})


class SourceError(Exception):
    """One source failed; the message is the cause alone, the caller knows the address."""


class _Retry(SourceError):
    """Worth another try at the same source."""


@dataclass
class _Part:
    """What ``X.part`` holds.

    Attributes:
        source: The address that its bytes came from.
        validator: ETag or Last-Modified of that version, empty where the server gave none.
        total: Bytes of the whole file, ``None`` where the server did not say.
    """

    source: str = ''
    validator: str = ''
    total: int | None = None


@dataclass
class _Transfer:
    """One file on its way."""

    source: str
    path: Path
    settings: Settings
    bar: tqdm
    part: _Part = field(default_factory=_Part)

    def __post_init__(self) -> None:
        self.note = self.path.with_name(self.path.name + '.json')
        try:
            kept = _Part(**json.loads(self.note.read_text(encoding='utf-8')))
        except (FileNotFoundError, ValueError, TypeError):
            kept = _Part()  # without a readable note nobody knows whose bytes these are: start again
        if kept.source == self.source and isinstance(kept.validator, str) and self.path.exists():
            self.part = kept
        else:
            self.restart()

    @property
    def have(self) -> int:
        """Bytes that lie on disk."""
        return self.path.stat().st_size if self.path.exists() else 0

    def restart(self) -> None:
        """Forget what lies on disk."""
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self.part = _Part(source=self.source)

    def request(self) -> urllib.request.Request:
        """Ask for the whole file, or for the rest of the version that lies on disk."""
        headers = {'User-Agent': f'mila_mm/{__version__}', 'Accept-Encoding': 'identity'}
        if self.have:
            headers['Range'] = f'bytes={self.have}-'
            if self.part.validator and not self.part.validator.startswith('W/'):  # RFC 9110 13.1.5: strong ones only
                headers['If-Range'] = self.part.validator
        return urllib.request.Request(self.source, headers=headers)

    def receive(self, response: http.client.HTTPResponse) -> None:
        """Append what a response brings, starting over where the server does so."""
        content_type = response.headers.get('Content-Type', '')
        if content_type.startswith('text/html'):
            raise SourceError('answered with a web page instead of a file; the share link may have expired')
        start, total = _extent(response)
        if start != self.have or (start and total is not None and self.part.total not in (None, total)):
            if start:
                self.restart()
                raise _Retry('the server sent another part of the file than was asked for')
            self.restart()
        validator = response.headers.get('ETag') or response.headers.get('Last-Modified') or ''
        self.part = _Part(self.source, validator, total)
        self.note.write_text(json.dumps(asdict(self.part)), encoding='utf-8')
        if total is not None and total - start > shutil.disk_usage(self.path.parent).free:
            raise DownloadError(
                f'{self.path.parent}: {total - start:,} bytes are needed, the disk has '
                f'{shutil.disk_usage(self.path.parent).free:,} free; make room or set MILA_HOME'
            )
        self.bar.total, self.bar.n = total, start
        self.bar.refresh()
        with self.path.open('ab') as file:
            while block := response.read1(_CHUNK):
                _write(file, block)
                self.bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        if total is not None and self.have < total:
            raise _Retry(f'the connection ended after {self.have:,} of {total:,} bytes')
        if total is not None and self.have > total:
            size = self.have
            self.restart()
            raise SourceError(f'sent {size:,} bytes where it had announced {total:,}')


def _write(file: BinaryIO, block: bytes) -> None:
    try:
        file.write(block)
    except OSError as error:
        raise DownloadError(f'{file.name}: cannot write ({error.strerror}); make room or set MILA_HOME') from error


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
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Message, newurl: str
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
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and transfer.have:
            transfer.restart()
            raise _Retry('the server refused to continue the file') from error
        kind = _Retry if error.code in _RETRY_STATUS else SourceError
        raise kind(f'HTTP {error.code} {printable(str(error.reason))}') from error
    except urllib.error.URLError as error:
        raise _Retry(f'no connection ({error.reason})') from error
    except TimeoutError as error:
        raise _Retry(f'no byte for {transfer.settings.timeout:g} s') from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
            raise DownloadError(
                f'{transfer.path}: cannot write ({error.strerror}); make room, or set MILA_HOME '
                'to a folder that you may write'
            ) from error
        raise _Retry(f'connection lost ({printable(str(error)) or type(error).__name__})') from error
    except ValueError as error:  # addresses that only the attempt shows to be none, here or in a redirect
        raise SourceError(f'not an address that can be opened ({printable(str(error))})') from error


def download(source: str, path: Path, settings: Settings, *, label: str, progress: bool | None = None) -> None:
    """Bring a file to ``path``, continuing what lies there from the same source.

    Args:
        source: https or http address, or a file on this machine.
        path: Where the bytes go. What this function leaves there is complete only if it returns.
        settings: Time-out, tries, pauses.
        label: What the progress bar calls it.
        progress: Whether to show the bar on stderr; ``None`` shows it on terminals.

    Raises:
        SourceError: If the source cannot give the file.
        DownloadError: If this machine cannot take it (disk full, no permission).
    """
    disable = None if progress is None else not progress
    with tqdm(desc=label, unit='B', unit_scale=True, unit_divisor=1024, disable=disable) as bar:
        if '://' not in source:
            _copy(Path(source).expanduser(), path, bar)
            return
        _check_address(source)
        transfer = _Transfer(source, path, settings, bar)
        # Only more than ever before counts as progress: a server that restarts the file gains again what was there.
        tries, best = 0, transfer.have
        while True:
            tries += 1
            try:
                _try_once(transfer)
            except _Retry as error:
                if transfer.have > best:
                    tries, best = 0, transfer.have
                    continue
                if tries >= settings.attempts:
                    raise SourceError(f'{error}, {tries} tries') from error
                time.sleep(min(settings.backoff * 2 ** (tries - 1), _MAX_PAUSE))
            else:
                return


def _copy(source: Path, path: Path, bar: tqdm) -> None:
    """Copy from a mirror that is a folder."""
    discard(path)
    try:
        bar.total = source.stat().st_size
        with source.open('rb') as reader, path.open('wb') as writer:
            while block := reader.read(_CHUNK):
                _write(writer, block)
                bar.update(len(block))
            writer.flush()
            os.fsync(writer.fileno())
    except FileNotFoundError as error:
        raise SourceError('no such file') from error
    except OSError as error:
        raise SourceError(f'cannot be copied ({error.strerror})') from error


def discard(path: Path) -> None:
    """Remove a partial file and the note beside it.

    Args:
        path: The ``.part`` file; it may be absent.
    """
    path.unlink(missing_ok=True)
    path.with_name(path.name + '.json').unlink(missing_ok=True)
