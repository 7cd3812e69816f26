"""Fetching: whole or not at all, once, resumed, checked, and with a way out when it fails."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mila_mm.errors import UserError
from mila_mm.weights.errors import DownloadError
from mila_mm.weights.source.cache import configure, read_record, record_path, settings
from mila_mm.weights.source.fetching import fetch, local_path
from mila_mm.weights.source.published import PublishedFile

ROOT = Path(__file__).resolve().parents[3]
FILE = '/weights.pth'


def test_fetched_once_and_recorded(server, home, published_bytes, entry):
    behaviour = server.put(FILE, body=published_bytes)
    path = fetch(entry(server))
    assert path == home / 'mila-micro.pth'
    assert path.read_bytes() == published_bytes
    record = read_record(path)
    assert record.size == len(published_bytes)
    assert record.sha256 == hashlib.sha256(published_bytes).hexdigest()
    assert fetch(entry(server)) == path
    assert behaviour.requests == ['']
    assert sorted(p.name for p in home.iterdir()) == ['mila-micro.pth', 'mila-micro.pth.json', 'mila-micro.pth.lock']


def test_a_cache_whose_folders_cannot_be_synced_takes_the_file(server, home, published_bytes, no_folder_sync, entry):
    """Network file systems refuse it; the download is whole, and a second use finds it."""
    page = server.put(FILE, body=published_bytes)
    assert fetch(entry(server)).read_bytes() == published_bytes
    assert no_folder_sync
    assert fetch(entry(server)).read_bytes() == published_bytes
    assert len(page.requests) == 1


@pytest.mark.parametrize('status', [404, 403, 503])
def test_refusal_says_what_to_fetch_by_hand_and_where_to_put_it(server, home, status, entry):
    server.put(FILE, status=status)
    with pytest.raises(DownloadError) as caught:
        fetch(entry(server))
    message = str(caught.value)
    assert f'HTTP {status}' in message
    assert f'fetch {server.base}{FILE} and save it as {home / "mila-micro.pth"}' in message
    assert not (home / 'mila-micro.pth').exists()


def test_wrong_size_and_wrong_hash_are_refused(server, home, published_bytes, entry):
    server.put(FILE, body=published_bytes)
    with pytest.raises(DownloadError, match=r'bytes, expected 12,345'):
        fetch(entry(server, size=12345))
    with pytest.raises(DownloadError, match=r'sha256 .* expected 00ff'):
        fetch(entry(server, sha256='00ff' * 16))
    assert not [p for p in home.iterdir() if p.suffix != '.lock']
    digest = hashlib.sha256(published_bytes).hexdigest()
    assert fetch(entry(server, size=len(published_bytes), sha256=digest)).exists()


def test_second_fetch_must_be_what_the_first_was(server, home, published_bytes, entry):
    server.put(FILE, body=published_bytes)
    path = fetch(entry(server))
    path.unlink()
    changed = bytearray(published_bytes)
    changed[len(changed) // 2] ^= 1
    server.put(FILE, body=bytes(changed))
    with pytest.raises(DownloadError, match=r'recorded .* at first'):
        fetch(entry(server))
    assert not path.exists()
    record_path(path).unlink()
    assert fetch(entry(server)).read_bytes() == bytes(changed)


def test_mirrors_come_first_and_the_next_is_tried(server, home, published_bytes, monkeypatch, tmp_path, entry):
    official = server.put(FILE, body=published_bytes)
    good = server.put('/good/mila-micro.pth', body=published_bytes)
    bad = server.put('/bad/mila-micro.pth', status=404)
    monkeypatch.setenv('MILA_MIRRORS', f'{server.base}/bad, {server.base}/good/')
    configure(mirrors=[str(tmp_path / 'no-such-folder')])
    assert fetch(entry(server)).read_bytes() == published_bytes
    assert (len(bad.requests), len(good.requests), len(official.requests)) == (1, 1, 0)


def test_folder_and_template_mirrors(server, home, published_bytes, tmp_path, entry):
    (tmp_path / 'share').mkdir()
    (tmp_path / 'share' / 'mila-micro.pth').write_bytes(published_bytes)
    configure(mirrors=[str(tmp_path / 'share')])
    assert fetch(entry(server)).read_bytes() == published_bytes
    (home / 'mila-micro.pth').unlink()
    server.put('/q?f=mila-micro.pth', body=published_bytes)
    configure(mirrors=[server.base + '/q?f={file}'])
    assert fetch(entry(server)).read_bytes() == published_bytes


@pytest.mark.parametrize('etag', ['', '"v1"'])
def test_a_source_does_not_continue_what_another_began(server, home, published_bytes, entry, etag):
    """Neither says which version it has, and both files are of one length: half of each would look whole."""
    other = bytes(byte ^ 1 for byte in published_bytes)
    cuts = [len(other) // 2, *[0] * 20]
    server.put('/m/mila-micro.pth', body=other, cut=cuts, etag=etag)
    page = server.put(FILE, body=published_bytes, etag=etag)
    configure(mirrors=[server.base + '/m'])
    assert fetch(entry(server)).read_bytes() == published_bytes
    assert len(cuts) < 20  # the mirror was asked, and asked to continue
    assert page.requests == ['']


def test_another_mirror_the_next_time_begins_anew(server, home, published_bytes, entry):
    server.put(FILE, body=published_bytes, cut=[len(published_bytes) // 2, *[0] * 20])
    with pytest.raises(DownloadError):
        fetch(entry(server))
    assert list(home.glob('*.part'))
    other = bytearray(published_bytes)
    other[len(other) // 4] ^= 1
    page = server.put('/m/mila-micro.pth', body=bytes(other))
    configure(mirrors=[server.base + '/m'])
    assert fetch(entry(server)).read_bytes() == bytes(other)
    assert page.requests == ['']


def test_mirrors_from_a_config(home):
    from mmengine.config import Config

    from mila_mm.engine.config.prepare import configure_weights

    configure_weights(Config(dict(mila_weights=dict(mirrors=['https://a.example', '/share'], offline=True))))
    assert settings().mirrors == ('https://a.example', '/share')
    assert settings().offline
    with pytest.raises(UserError, match=r'mila_weights: .*miror'):
        configure_weights(Config(dict(mila_weights=dict(miror=[]))))


def test_offline_uses_the_cache_and_nothing_else(server, home, published_bytes, monkeypatch, entry):
    behaviour = server.put(FILE, body=published_bytes)
    monkeypatch.setenv('MILA_OFFLINE', '1')
    with pytest.raises(DownloadError, match='MILA_OFFLINE forbids'):
        fetch(entry(server))
    assert behaviour.requests == []
    monkeypatch.setenv('MILA_OFFLINE', '0')
    fetch(entry(server))
    monkeypatch.setenv('MILA_OFFLINE', 'yes')
    assert fetch(entry(server)).exists()
    assert len(behaviour.requests) == 1
    monkeypatch.setenv('MILA_OFFLINE', 'perhaps')
    with pytest.raises(UserError, match="MILA_OFFLINE='perhaps'"):
        settings()


def test_unknown_scheme_and_dead_host(server, home):
    configure(attempts=1)
    dead = PublishedFile('micro', 'classification', 'micro', 'http://127.0.0.1:9/x', 'model', '', '')
    with pytest.raises(DownloadError, match='no connection'):
        fetch(dead)
    configure(mirrors=['ftp://a.example'])
    with pytest.raises(DownloadError, match='unknown kind of address'):
        fetch(dead)


def test_address_of_ones_own(server, home, published_bytes):
    digest = hashlib.sha256(published_bytes).hexdigest()
    server.put('/a/model.pth', body=published_bytes)
    server.put('/b/model.pth?x=1', body=published_bytes)
    one, two = local_path(f'{server.base}/a/model.pth'), local_path(f'{server.base}/b/model.pth?x=1')
    assert one != two  # not taken for one another because both are called model.pth
    server.put(f'/net-{digest[:8]}.pth', body=published_bytes)
    assert local_path(f'{server.base}/net-{digest[:8]}.pth').name == f'net-{digest[:8]}.pth'
    server.put('/net-0000000a.pth', body=published_bytes)
    with pytest.raises(DownloadError, match='expected 0000000a'):
        local_path(f'{server.base}/net-0000000a.pth')


def test_date_in_a_name_is_not_a_hash(server, home, published_bytes):
    server.put('/net-20240115.pth', body=published_bytes)
    assert local_path(f'{server.base}/net-20240115.pth').read_bytes() == published_bytes


@pytest.mark.parametrize(
    'address',
    [
        'https://a.example/x%00.pth',
        f'https://a.example/{"x" * 300}.pth',
        'http://[::1/x.pth',
        'https://a.example:port/x.pth',
        'https://a.example/\xe4.pth',
        'https://a.example/\ud800',
    ],
)
def test_what_is_no_address_is_named(address, home):
    with pytest.raises(UserError, match=r'not an address|no file can have'):
        fetch(address)


def test_braces_in_mirrors_are_their_own(server, home, published_bytes, entry):
    server.put('/{arch}/mila-micro.pth', body=published_bytes)
    configure(mirrors=[server.base + '/{arch}/{file}'])
    path = fetch(entry(server))
    assert read_record(path).source == server.base + '/{arch}/mila-micro.pth'
    path.unlink()
    configure(mirrors=['http://[::1'])
    with pytest.raises(UserError, match='not an address'):
        fetch(entry(server))


def test_missing_path_says_how_published_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='mila://tiny-in1k'):
        local_path(str(tmp_path / 'no.pth'))


FETCH = """
import sys
from mila_mm.weights.source.fetching import fetch
from mila_mm.weights.source.published import PublishedFile
assert 'torch' not in sys.modules
print(fetch(PublishedFile('micro', 'classification', 'micro', sys.argv[1], 'model', '', '')))
"""


def start_fetching(server, home):
    env = {**os.environ, 'MILA_HOME': str(home), 'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(
        [sys.executable, '-c', FETCH, server.base + FILE],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_download_leaves_nothing_that_looks_whole_and_is_continued(server, home, published_bytes, entry):
    slow = server.put(FILE, body=published_bytes, pause=0.1, block=50_000)
    process = start_fetching(server, home)
    part = home / 'mila-micro.pth.part'
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 50_000):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (home / 'mila-micro.pth').exists()
    kept = part.stat().st_size
    assert 0 < kept < len(published_bytes)
    slow.pause = 0
    # the dead process's lock does not block, and its bytes are not fetched again
    assert fetch(entry(server)).read_bytes() == published_bytes
    assert slow.requests == ['', f'bytes={kept}-']


def test_ranks_share_one_download(server, home, published_bytes):
    behaviour = server.put(FILE, body=published_bytes, pause=0.05, block=50_000)
    ranks = [start_fetching(server, home) for _ in range(3)]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {str(home / 'mila-micro.pth')}
    assert behaviour.requests == ['']


def test_threads_share_one_download(server, home, published_bytes, entry):
    behaviour = server.put(FILE, body=published_bytes, pause=0.02, block=50_000)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: fetch(entry(server)), range(4)))
    assert len(set(paths)) == 1
    assert behaviour.requests == ['']
