"""tools/weights.py: what it prints, and how it ends."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from mila_mm import cli
from mila_mm.weights.source.cache import record_path


@pytest.fixture
def tool(root, capsys):
    """Run the command in this process: status, output, errors."""
    spec = importlib.util.spec_from_file_location('weights_command', root / 'tools' / 'weights.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*argv):
        capsys.readouterr()
        status = cli.execute(module.main, [str(arg) for arg in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def filled(home, published_bytes):
    """Cache that holds one published file."""
    home.mkdir()
    (home / 'mila-tiny-in1k.pth').write_bytes(published_bytes)
    return home


def test_list_shows_what_is_here(tool, filled):
    status, out, _ = tool('list')
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert len(lines) == 10  # a heading and nine files
    assert lines['tiny-in1k'].endswith('MB')
    assert lines['small-in1k'].endswith(' -')
    assert 'box AP 48.8, mask AP 43.8' in lines['mask-rcnn-tiny-3x']


def test_fetch_from_a_mirror(tool, server, home, published_bytes):
    server.put('/mila-tiny-in1k.pth', body=published_bytes)
    status, out, err = tool('fetch', 'tiny-in1k', '--mirror', server.base)
    assert (status, out.strip()) == (0, str(home / 'mila-tiny-in1k.pth')), err


def test_fetch_fails_with_the_way_out(tool, server, home, monkeypatch):
    monkeypatch.setattr('mila_mm.weights.source.published.PUBLISHED', {})
    assert tool('fetch', 'tiny-in1k')[0] == 2
    status, out, err = tool('fetch', f'{server.base}/no.pth')
    assert status == 2
    assert 'HTTP 404' in err
    assert 'by hand' in err
    assert 'Traceback' not in out + err
    assert tool('fetch')[0] == 2


def test_verify(tool, filled, home, published_bytes):
    status, out, _ = tool('verify')
    assert status == 0
    assert 'tiny-in1k: ok' in out
    assert record_path(home / 'mila-tiny-in1k.pth').exists()
    changed = bytearray(published_bytes)
    changed[len(changed) // 2] ^= 1
    (home / 'mila-tiny-in1k.pth').write_bytes(bytes(changed))
    status, _, err = tool('verify')
    assert status == 2
    assert 'recorded' in err
    status, _, err = tool('verify', 'small-in1k')
    assert status == 2
    assert 'not in the cache' in err


def test_inspect(tool, filled, home):
    status, out, _ = tool('inspect', 'mila://tiny-in1k', '--keys')
    assert status == 0
    for words in (
        'entries: model (OrderedDict), epoch (int), max_accuracy (float64)',
        'MILA custom (width 16, depths 1 1 2 1)',
        'left out when loading: 5 RoPE tables',
        '  layers.0.blocks.0.attn.qk.weight (32, 16)',
    ):
        assert words in out


def test_inspect_names_nan(tool, tmp_path):
    torch.save({'state_dict': {'a': torch.tensor([1.0, float('nan')]), 'b': torch.ones(1)}}, tmp_path / 'a.pth')
    status, out, _ = tool('inspect', tmp_path / 'a.pth')
    assert status == 0
    assert 'NaN or infinity in 1 tensors: a' in out
    assert 'no MILA in it' in out


def test_keys_cannot_steer_the_terminal(tool, tmp_path):
    torch.save(
        {'state_dict': {'a\x1b[2J': torch.tensor([float('nan')]), 'b\ud800': torch.ones(1)}, '\x1b]0;x\x07': 1},
        tmp_path / 'a.pth',
    )
    status, out, err = tool('inspect', tmp_path / 'a.pth', '--keys')
    assert status == 0, err
    assert '\x1b' not in out
    assert r'a\x1b[2J' in out
    assert r'b\ud800' in out


def test_export_with_rope_of_what_is_no_mila(tool, tmp_path):
    torch.save(
        {
            'model': {
                'patch_embed.conv1.conv.weight': torch.ones(4, 3, 3, 3),
                'layers.0.blocks.0.attn.qk.weight': torch.tensor(1.0),
            }
        },
        tmp_path / 'a.pth',
    )
    status, _, err = tool('export', tmp_path / 'a.pth', tmp_path / 'b.pth', '--rope', '64')
    assert status == 2
    assert 'layers.0.blocks.0.attn.qk.weight: shape ()' in err


def test_export_and_back(tool, filled, tmp_path, classifier):
    status, out, _ = tool('export', 'mila://tiny-in1k', tmp_path / 'a.safetensors', '--rope', '64')
    assert (status, out.strip()) == (0, f'{tmp_path / "a.safetensors"}: {len(classifier)} tensors')
    status, out, _ = tool('inspect', tmp_path / 'a.safetensors')
    assert status == 0
    assert 'safetensors' in out


@pytest.mark.parametrize(
    'argv',
    [
        [],
        ['nonsense'],
        ['inspect'],
        ['inspect', '/no/such/file.pth'],
        ['export', '/no/such/file.pth', 'a.pth'],
        ['fetch', 'tiny-in2k'],
        ['verify', 'tiny-in2k'],
        ['export', 'a.pth', 'b.pth', '--names', 'other'],
    ],
)
def test_mistakes_end_in_one_message(tool, argv, home):
    status, out, err = tool(*argv)
    assert status == 2
    assert err.startswith('error: ')
    assert len(err.splitlines()) <= 3
    assert 'Traceback' not in out + err


def test_as_a_command(root, filled):
    env = {**os.environ, 'PYTHONPATH': str(root), 'MILA_HOME': str(filled)}
    done = subprocess.run(
        [sys.executable, str(root / 'tools' / 'weights.py'), 'list'],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert 'upernet-base-160k' in done.stdout


def test_gather_makes_one_file_of_shards(tool, tmp_path):
    from torch.distributed import checkpoint as dcp

    from mila_mm.weights.file.sharded import STATE, ShardWriter

    folder, out = tmp_path / 'iter_8.pth', tmp_path / 'whole.pth'
    folder.mkdir()
    state = dict(meta=dict(iter=8), message_hub={}, optimizer=dict(state={}, param_groups=[dict(params=[0])]))
    torch.save(state, folder / STATE)
    tensors = {'model.a': torch.ones(3), 'optimizer.0.exp_avg': torch.zeros(3)}
    dcp.save(tensors, storage_writer=ShardWriter(folder), no_dist=True)
    status, printed, _ = tool('gather', folder, out)
    assert status == 0 and '1 tensors' in printed
    content = torch.load(out)
    assert torch.equal(content['state_dict']['a'], torch.ones(3)) and 'optimizer' not in content
    assert tool('gather', folder, out, '--all')[0] == 0
    content = torch.load(out)
    assert torch.equal(content['optimizer']['state'][0]['exp_avg'], torch.zeros(3)) and content['meta']['iter'] == 8
    status, _, err = tool('gather', tmp_path, out)
    assert status == 2 and 'no folder of shards' in err
