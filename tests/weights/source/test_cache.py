"""The cache: records, and what has changed or been put there by hand."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from mila_mm.errors import UserError
from mila_mm.weights.errors import CheckpointError, DownloadError
from mila_mm.weights.source.cache import Record, configure, read_record, record_path, write_record
from mila_mm.weights.source.fetching import fetch, verify, wanted

FILE = '/weights.pth'


def test_threads_write_records_of_their_own(tmp_path):
    path, record = tmp_path / 'a.pth', Record(1, 'ab' * 32, 2, 'by hand')
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write_record, path, record) for _ in range(200)]:
            done.result()
    assert read_record(path) == record
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth.json']


def test_mirrors_given_as_one_string_are_refused(home):
    with pytest.raises(UserError, match='expected a list'):
        configure(mirrors='https://a.example')


def test_file_put_there_by_hand_is_taken_in(server, home, published_bytes, entry):
    home.mkdir()
    (home / 'mila-micro.pth').write_bytes(published_bytes)
    assert fetch(entry(server)) == home / 'mila-micro.pth'
    assert read_record(home / 'mila-micro.pth').source == 'by hand'


def test_web_page_put_there_by_hand_is_refused(server, home, entry):
    home.mkdir()
    (home / 'mila-micro.pth').write_text('<html>login</html>')
    with pytest.raises(CheckpointError, match=r'(?s)web page.*delete it'):
        fetch(entry(server))


def test_cached_file_that_changed_is_refused(server, home, published_bytes, entry):
    server.put(FILE, body=published_bytes)
    path = fetch(entry(server))
    changed = bytearray(published_bytes)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(CheckpointError, match='recorded'):
        fetch(entry(server))
    path.write_bytes(published_bytes)  # the same again: another time, the same contents
    assert fetch(entry(server)) == path


def test_silent_damage_is_found_by_verify(server, home, published_bytes, entry):
    server.put(FILE, body=published_bytes)
    path, stat = fetch(entry(server)), os.stat(home / 'mila-micro.pth')
    changed = bytearray(published_bytes)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(bytes(changed))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fetch(entry(server))  # size and time say nothing
    with pytest.raises(CheckpointError, match='recorded'):
        verify(wanted(entry(server)), full=True)


def test_broken_record_is_not_ignored(server, home, published_bytes, entry):
    server.put(FILE, body=published_bytes)
    record_path(fetch(entry(server))).write_text('{"size": ')
    with pytest.raises(UserError, match='not a record'):
        fetch(entry(server))


def test_cache_that_cannot_be_written(server, tmp_path, home, monkeypatch, published_bytes, entry):
    server.put(FILE, body=published_bytes)
    (tmp_path / 'plain-file').write_text('')
    monkeypatch.setenv('MILA_HOME', str(tmp_path / 'plain-file'))
    with pytest.raises(DownloadError, match='MILA_HOME'):
        fetch(entry(server))
