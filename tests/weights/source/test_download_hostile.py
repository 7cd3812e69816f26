"""Servers and caches that lie: an error in one or two lines that names the cause, and nothing left behind."""

import json

import pytest

from mila_mm.errors import UserError
from mila_mm.weights.errors import DownloadError
from mila_mm.weights.source.cache import configure, record_path
from mila_mm.weights.source.fetching import fetch
from mila_mm.weights.source.published import PublishedFile

FILE = '/weights.pth'


@pytest.fixture
def entry(server, home):
    configure(attempts=2)
    return PublishedFile('micro', 'classification', 'micro', server.base + FILE, 'model', '', '')


def nothing_kept(home):
    return not [path for path in home.iterdir() if path.suffix != '.lock']


@pytest.mark.parametrize('length', ['9' * 5000, '\xb2', '-5', '1e3', '0x10'])
def test_length_that_is_no_number(server, entry, published_bytes, length):
    """The bytes count, then: all of them came."""
    server.put(FILE, body=published_bytes, announce=length)
    assert fetch(entry).read_bytes() == published_bytes


def test_length_beyond_every_disk(server, entry, home):
    server.put(FILE, body=b'x', announce=10**17)
    with pytest.raises(DownloadError, match='make room'):
        fetch(entry)
    assert not (home / 'mila-micro.pth').exists()


@pytest.mark.parametrize(
    'target',
    [
        'file:///etc/passwd',
        'ftp://127.0.0.1/x',
        'data:text/plain,x',
        'http://[::1/x',
        f'http://{"a" * 300}/x',
        'http://127.0.0.1:port/x',
        'http://a b/x',
        'gopher://x',
    ],
)
def test_redirect_away_from_the_web(server, entry, home, target):
    server.put(FILE, redirect=target)
    with pytest.raises(DownloadError, match=r'refused|not allowed|not an address|connection') as caught:
        fetch(entry)
    assert 'by hand' in str(caught.value)
    assert nothing_kept(home)


def test_redirect_in_circles(server, entry, home):
    server.put(FILE, redirect=FILE)
    with pytest.raises(DownloadError, match='302'):
        fetch(entry)
    assert nothing_kept(home)


def test_host_that_cannot_be_one(home):
    with pytest.raises(DownloadError, match='not an address'):
        fetch(f'https://{"a" * 70}.example/x.pth')


def test_answers_cannot_steer_the_terminal(server, entry):
    server.put(FILE, status=403, reason='\x1b[2Jno' + 'x' * 5000)
    with pytest.raises(DownloadError) as caught:
        fetch(entry)
    assert str(caught.value).replace('\n', '').isprintable()
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize(
    'note', ['[]', '{', '{"source": 5}', '{"validator": 7}', '{"total": "x"}', '{"more": 1}', '\xff']
)
def test_note_of_a_partial_file_that_was_tampered_with(server, entry, home, published_bytes, note):
    home.mkdir()
    if note.startswith('{"'):
        note = json.dumps({'source': server.base + FILE, **json.loads(note)})
    (home / 'mila-micro.pth.part').write_bytes(b'evil')
    (home / 'mila-micro.pth.part.json').write_text(note, encoding='latin-1')
    behaviour = server.put(FILE, body=published_bytes, ranges='ignored')
    assert fetch(entry).read_bytes() == published_bytes
    assert len(behaviour.requests) == 1


@pytest.mark.parametrize(
    'record', [b'[]', b'5', b'\xff\xfe', b'{"size": 1}', b'{"size": "x", "sha256": "", "mtime_ns": 0, "source": ""}']
)
def test_record_that_was_tampered_with_is_named(server, entry, published_bytes, record):
    server.put(FILE, body=published_bytes)
    record_path(fetch(entry)).write_bytes(record)
    with pytest.raises(UserError, match='not a record'):
        fetch(entry)


def test_record_with_another_hash_is_not_believed(server, entry, published_bytes):
    server.put(FILE, body=published_bytes)
    place = record_path(fetch(entry))
    place.write_text(json.dumps({**json.loads(place.read_text()), 'sha256': '0' * 64, 'mtime_ns': 0}))
    with pytest.raises(UserError, match=f'recorded {"0" * 64}'):
        fetch(entry)


def test_record_that_cannot_be_read(server, entry, published_bytes):
    server.put(FILE, body=published_bytes)
    place = record_path(fetch(entry))
    place.unlink()
    place.mkdir()
    with pytest.raises(UserError, match='cannot be read'):
        fetch(entry)


def test_links_in_the_cache(server, entry, home, tmp_path, published_bytes):
    """A link to a file is that file; one to nothing is replaced, and what it points to is not written."""
    home.mkdir()
    (home / 'mila-micro.pth').symlink_to(tmp_path / 'elsewhere.pth')
    server.put(FILE, body=published_bytes)
    assert fetch(entry).read_bytes() == published_bytes
    assert not (home / 'mila-micro.pth').is_symlink()
    assert not (tmp_path / 'elsewhere.pth').exists()


def test_record_is_there_before_the_file(server, entry, home, published_bytes, monkeypatch):
    """Otherwise a process that looks in between would hash the file and call it placed by hand."""
    import os

    server.put(FILE, body=published_bytes)
    real, seen = os.replace, []

    def replace(source, target):
        if str(target).endswith('.pth'):
            seen.append(record_path(home / 'mila-micro.pth').exists())
        real(source, target)

    monkeypatch.setattr('mila_mm.files.os.replace', replace)
    fetch(entry)
    assert seen == [True]
