"""Servers and caches that lie: an error in one or two lines that names the cause, and nothing left behind."""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from mila_mm.errors import UserError
from mila_mm.weights.errors import DownloadError
from mila_mm.weights.source.cache import configure, read_record, record_path
from mila_mm.weights.source.fetching import fetch
from mila_mm.weights.source.part import Part
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
    configure(max_bytes=10**18)
    server.put(FILE, body=b'x', announce=10**17)
    with pytest.raises(DownloadError, match='make room'):
        fetch(entry)
    assert not (home / 'mila-micro.pth').exists()


def test_announced_length_beyond_the_limit(server, entry, home):
    configure(max_bytes=1000)
    server.put(FILE, body=b'x', announce=1001)
    with pytest.raises(DownloadError, match='announces 1,001 bytes, more than the 1,000'):
        fetch(entry)
    assert not (home / 'mila-micro.pth').exists()


@pytest.mark.parametrize('again', [False, True], ids=['at once', 'in pieces'])
def test_more_bytes_than_the_limit_without_a_length(server, entry, home, again):
    """Nor does it help to send a little with each connection."""
    configure(max_bytes=200_000)
    server.put(FILE, body=b'PK\3\4' + bytes(10**7), announce=0, cut=[60_000] * 9 if again else [], ranges='ok')
    with pytest.raises(DownloadError, match='more bytes, more than the 200,000' if not again else 'micro'):
        fetch(entry)
    assert sum(path.stat().st_size for path in home.iterdir()) < 300_000


def test_a_server_that_drips_the_file(server, entry, home, published_bytes):
    configure(deadline=0.7, timeout=30)
    server.put(FILE, body=published_bytes, block=1, pause=0.05)
    start = time.monotonic()
    with pytest.raises(DownloadError, match='not done within the deadline') as caught:
        fetch(entry)
    assert time.monotonic() - start < 20
    assert 'by hand' in str(caught.value)
    kept = (home / 'mila-micro.pth.part').read_bytes()
    assert kept and published_bytes.startswith(kept)


def test_a_server_that_drips_its_headers(home):
    listening = socket.create_server(('127.0.0.1', 0))

    def drip() -> None:
        connection, _ = listening.accept()
        with contextlib.suppress(OSError):
            connection.recv(1000)
            for letter in itertools.cycle(b'HTTP/1.1 200 OK'):
                connection.send(bytes([letter]))
                time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    configure(deadline=0.7, timeout=30)
    address = f'http://127.0.0.1:{listening.getsockname()[1]}/a.pth'
    with pytest.raises(DownloadError, match='not done within the deadline'):
        fetch(address)
    listening.close()


def test_a_server_that_closes_after_each_byte(server, entry, published_bytes):
    """Each connection brings something, so that none counts as failed."""
    configure(deadline=0.7)
    server.put(FILE, body=published_bytes, cut=[1] * 10_000)
    with pytest.raises(DownloadError, match='deadline'):
        fetch(entry)


def test_a_slow_mirror_gives_way_to_the_next_source(server, entry, published_bytes, monkeypatch):
    monkeypatch.setattr('mila_mm.weights.source.download._WINDOW', 0.3)
    configure(mirrors=[f'{server.base}/slow'], min_rate=10_000)
    server.put('/slow/mila-micro.pth', body=published_bytes, block=1, pause=0.05)
    server.put(FILE, body=published_bytes)
    assert fetch(entry).read_bytes() == published_bytes


def test_a_lock_that_is_never_released(server, entry, home, published_bytes):
    home.mkdir()
    configure(deadline=0.1)
    server.put(FILE, body=published_bytes)
    with (
        FileLock(str(home / 'mila-micro.pth.lock')),
        ThreadPoolExecutor(1) as pool,
        pytest.raises(DownloadError, match='another process has been fetching it'),
    ):
        pool.submit(fetch, entry).result()


@pytest.mark.parametrize(
    'limit',
    [dict(deadline=0), dict(deadline='1'), dict(max_bytes=-1), dict(min_rate=-1), dict(timeout=True), dict(attempts=0)],
    ids=repr,
)
def test_limits_that_are_none(home, limit):
    with pytest.raises(UserError, match=f'{next(iter(limit))}: expected a number above 0'):
        configure(**limit)


def plant_link(place, victim):
    place.symlink_to(victim)


def plant_hard_link(place, victim):
    place.hardlink_to(victim)


def plant_pipe(place, victim):
    os.mkfifo(place)


PLANTED = [(where, plant) for where in ('.part', '.part.json') for plant in (plant_link, plant_hard_link, plant_pipe)]


# A record that cannot be read is an error, since it may hold the checksum; so of it a link to nothing alone is here.
@pytest.mark.parametrize(('where', 'plant'), [*PLANTED, ('.json', plant_link)])
@pytest.mark.parametrize('noted', [False, True], ids=['alone', 'with a note'])
def test_what_others_planted_is_not_written_to(server, entry, home, tmp_path, published_bytes, where, plant, noted):
    home.mkdir()
    victim = tmp_path / 'thesis.tex'
    victim.write_text('years of work')
    if where == '.json':
        victim.unlink()  # a record that does not exist yet
    if noted:
        note = dict(source=server.base + FILE, validator='', total=None)
        (home / 'mila-micro.pth.part').write_bytes(published_bytes[:13])
        (home / 'mila-micro.pth.part.json').write_text(json.dumps(note))
        (home / f'mila-micro.pth{where}').unlink(missing_ok=True)
    plant(home / f'mila-micro.pth{where}', victim)
    server.put(FILE, body=published_bytes, etag='"1"')
    path = fetch(entry)
    assert path.read_bytes() == published_bytes
    assert not path.is_symlink() and path.stat().st_nlink == 1
    assert not victim.exists() if where == '.json' else victim.read_text() == 'years of work'


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root can make files of others')
def test_a_part_of_another_user_is_not_continued(server, entry, home, published_bytes):
    home.mkdir()
    part = home / 'mila-micro.pth.part'
    part.write_bytes(b'evil')
    os.chown(part, 12345, 12345)
    (home / 'mila-micro.pth.part.json').write_text(
        json.dumps(dict(source=server.base + FILE, validator='', total=None))
    )
    behaviour = server.put(FILE, body=published_bytes)
    assert fetch(entry).read_bytes() == published_bytes
    assert behaviour.requests == ['']


def test_a_folder_in_the_place_of_the_part(server, entry, home, published_bytes):
    (home / 'mila-micro.pth.part').mkdir(parents=True)
    server.put(FILE, body=published_bytes)
    with pytest.raises(DownloadError, match='lies in the way and cannot be removed'):
        fetch(entry)


def test_a_part_that_is_replaced_on_the_way(server, entry, home, published_bytes, monkeypatch):
    append = Part.append

    def replaced(part, block):
        append(part, block)
        part.path.unlink(missing_ok=True)
        part.path.write_bytes(b'evil')

    monkeypatch.setattr(Part, 'append', replaced)
    server.put(FILE, body=published_bytes)
    with pytest.raises(DownloadError, match='was replaced'):
        fetch(entry)
    assert not (home / 'mila-micro.pth').exists()


def test_a_mirror_that_is_a_pipe_or_a_device(entry, home, tmp_path, server, published_bytes):
    os.mkfifo(tmp_path / 'mila-micro.pth')
    (tmp_path / 'deep').mkdir()
    (tmp_path / 'deep/mila-micro.pth').symlink_to('/dev/zero')
    configure(mirrors=[str(tmp_path), str(tmp_path / 'deep')])
    server.put(FILE, body=published_bytes)
    assert fetch(entry).read_bytes() == published_bytes


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
    'note',
    [
        *('[]', '{', '[' * 9000, '\xff'),
        *('{"source": 5}', '{"validator": 7}', '{"total": "x"}', '{"total": true}', '{"more": 1}'),
        '{"validator": "a\\r\\nHost: evil"}',
    ],
    ids=lambda note: note[:30],
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
    'record',
    [
        *(b'[]', b'5', b'\xff\xfe', b'{"size": 1}', b'[' * 60_000, b'x' * 60_000),
        *(
            json.dumps({'size': 1, 'sha256': 'a' * 64, 'mtime_ns': 0, 'source': 'x', **change}).encode()
            for change in (
                {'size': 'x'},
                {'size': -1},
                {'size': True},
                {'size': 1e400},
                {'mtime_ns': 10**30},
                {'sha256': 'a'},
                {'sha256': '\x1b' * 64},
                {'source': None},
            )
        ),
    ],
    ids=lambda record: repr(record[:90]),
)
def test_record_that_was_tampered_with_is_named(server, entry, published_bytes, record):
    server.put(FILE, body=published_bytes)
    record_path(fetch(entry)).write_bytes(record)
    with pytest.raises(UserError, match='not a record'):
        fetch(entry)


def test_a_record_cannot_steer_the_terminal(server, entry, published_bytes):
    server.put(FILE, body=published_bytes)
    path = fetch(entry)
    place = record_path(path)
    place.write_text(json.dumps({**json.loads(place.read_text()), 'source': '\x1b[2Jcleared\nforged' * 500}))
    assert read_record(path).source.isprintable() and len(read_record(path).source) < 1500


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
