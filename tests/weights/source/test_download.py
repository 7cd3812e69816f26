"""A download: whole or not at all, resumed, over connections and servers that fail."""

from urllib.request import Request

import pytest

from mila_mm.weights.errors import DownloadError
from mila_mm.weights.source.cache import configure, settings
from mila_mm.weights.source.download import SourceError, _Redirects
from mila_mm.weights.source.fetching import fetch

FILE = '/weights.pth'


def test_slow_server_is_waited_for(server, home, published_bytes, entry):
    configure(timeout=0.5)
    server.put(FILE, body=published_bytes, pause=0.1, block=len(published_bytes) // 8)  # longer than the time-out
    assert fetch(entry(server)).read_bytes() == published_bytes


def test_silent_server_counts_as_dead(server, home, published_bytes, entry):
    configure(timeout=0.15, attempts=2)
    server.put(FILE, body=published_bytes, stall=1.0)
    with pytest.raises(DownloadError, match=r'no byte for 0.15 s, 2 tries'):
        fetch(entry(server))


@pytest.mark.parametrize('etag', ['', '"v1"', 'W/"v1"'])
def test_cut_connection_is_continued(server, home, published_bytes, etag, entry):
    behaviour = server.put(FILE, body=published_bytes, cut=[100_000, 50_000], etag=etag)
    assert fetch(entry(server)).read_bytes() == published_bytes
    assert behaviour.requests == ['', 'bytes=100000-', 'bytes=150000-']


@pytest.mark.parametrize('ranges', ['ignored', 'refused', 'shifted'])
def test_refused_range_starts_from_zero(server, home, published_bytes, ranges, entry):
    behaviour = server.put(FILE, body=published_bytes, cut=[100_000], ranges=ranges)
    assert fetch(entry(server)).read_bytes() == published_bytes
    assert behaviour.requests[:2] == ['', 'bytes=100000-']


def test_file_that_changed_meanwhile_is_not_glued(server, home, published_bytes, entry):
    old = server.put(FILE, body=b'x' * 200_000, cut=[100_000] + [0] * 9, etag='"old"')
    with pytest.raises(DownloadError, match='ended after 100,000 of 200,000 bytes'):
        fetch(entry(server))
    assert old.requests[1] == 'bytes=100000-'
    new = server.put(FILE, body=published_bytes, etag='"new"')
    assert fetch(entry(server)).read_bytes() == published_bytes
    assert new.requests == ['bytes=100000-']  # asked with If-Range, answered with all of the new file


def test_endless_cuts_end(server, home, published_bytes, entry):
    server.put(FILE, body=published_bytes, cut=[100_000] + [0] * 9)
    with pytest.raises(DownloadError, match='ended after 100,000') as caught:
        fetch(entry(server))
    assert not (home / 'mila-micro.pth').exists()
    assert str(home / 'mila-micro.pth') in str(caught.value)


def test_alternating_cuts_end(server, home, published_bytes, entry):
    """A server without ranges gives the same bytes again after a restart: no progress."""
    behaviour = server.put(FILE, body=published_bytes, ranges='ignored', cut=[100_000, 50_000] * 10)
    with pytest.raises(DownloadError, match='tries'):
        fetch(entry(server))
    assert len(behaviour.requests) == 1 + settings().attempts


def test_length_is_not_announced_and_the_file_is_cut(server, home, published_bytes, entry):
    server.put(FILE, body=published_bytes[:-1000], announce=0)
    with pytest.raises(DownloadError, match='truncated or damaged'):
        fetch(entry(server))
    assert not list(home.glob('mila-micro.pth*')) or [p.suffix for p in home.iterdir()] == ['.lock']


def test_more_bytes_than_announced_are_not_a_file(server, home, published_bytes, entry):
    server.put(FILE, body=published_bytes, announce=len(published_bytes) - 500)
    with pytest.raises(DownloadError):  # the rest is never read: what came is cut off
        fetch(entry(server))
    assert not (home / 'mila-micro.pth').exists()


def test_redirect_is_followed_also_when_resuming(server, home, published_bytes, entry):
    server.put(FILE, redirect='/real')
    real = server.put('/real', body=published_bytes, cut=[100_000])
    assert fetch(entry(server)).read_bytes() == published_bytes
    assert real.requests == ['', 'bytes=100000-']


def test_redirect_from_https_to_http_is_refused():
    with pytest.raises(SourceError, match='redirects from https'):
        _Redirects().redirect_request(Request('https://a.example/x'), None, 302, 'Found', {}, 'http://a.example/x')


@pytest.mark.parametrize('content_type', ['text/html; charset=utf-8', 'application/octet-stream'])
def test_web_page_instead_of_the_file(server, home, content_type, entry):
    page = b'<!DOCTYPE html>\n<html><body>Link expired</body></html>'
    server.put(FILE, body=page, content_type=content_type)
    with pytest.raises(DownloadError, match='web page'):
        fetch(entry(server))
    assert not [p for p in home.iterdir() if p.suffix != '.lock']


def test_progress_is_shown_where_asked_for(server, home, published_bytes, capfd, entry):
    server.put(FILE, body=published_bytes)
    fetch(entry(server), progress=True)
    shown = capfd.readouterr().err
    assert 'mila://micro: 100%' in shown
    assert 'B/s' in shown


def test_full_disk_is_seen_before_the_download(server, home, published_bytes, monkeypatch, entry):
    server.put(FILE, body=published_bytes)
    usage = type('Usage', (), dict(total=1, used=1, free=1000))
    monkeypatch.setattr('mila_mm.weights.source.download.shutil.disk_usage', lambda _: usage)
    with pytest.raises(DownloadError, match='1,000 free'):
        fetch(entry(server))
