"""Checkpoints in the published layouts, and a web server that misbehaves on request."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent / 'data'
PARITY = Path(__file__).parents[1] / 'data' / 'parity'
MICRO_ARCH = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))


@dataclass
class Behaviour:
    """How the server answers one address.

    Attributes:
        body: The file.
        status: Answer with this instead of the file.
        reason: Words beside that status, for the standard ones.
        redirect: Answer with 302 to this path.
        etag: Sent if set.
        content_type: Sent always.
        cut: Bytes after which the connection is closed, one entry for each request; None sends all.
        ranges: 'ok', 'ignored' (whole file, 200), 'refused' (416) or 'shifted' (another part than asked for).
        announce: Content-Length to claim instead of the true one, any text; 0 for none at all.
        pause: Seconds between blocks.
        block: Bytes of a block.
        stall: Seconds of silence before the body.
        requests: Range header of every request ('' for none).
    """

    body: bytes = b''
    status: int = 200
    reason: str = ''
    redirect: str = ''
    etag: str = ''
    content_type: str = 'application/octet-stream'
    cut: list = field(default_factory=list)
    ranges: str = 'ok'
    announce: int | str | None = None
    pause: float = 0.0
    block: int = 1 << 16
    stall: float = 0.0
    requests: list = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        """Say nothing."""

    def do_GET(self):
        behaviour = self.server.files.get(self.path)
        if behaviour is None:
            self.send_error(404)
            return
        behaviour.requests.append(self.headers.get('Range', ''))
        if behaviour.redirect:
            self.send_response(302)
            self.send_header('Location', behaviour.redirect)
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        if behaviour.status != 200:
            self.send_error(behaviour.status, behaviour.reason or None)
            return
        self._send(behaviour)

    def _send(self, behaviour):
        start, body = 0, behaviour.body
        wanted = self.headers.get('Range')
        current = self.headers.get('If-Range') in (None, behaviour.etag)
        if wanted and behaviour.ranges == 'refused':
            self.send_error(416)
            return
        if wanted and current and behaviour.ranges in ('ok', 'shifted'):
            start = int(wanted.removeprefix('bytes=').rstrip('-')) + (behaviour.ranges == 'shifted')
            self.send_response(206)
            self.send_header('Content-Range', f'bytes {start}-{len(body) - 1}/{len(body)}')
        else:
            self.send_response(200)
        length = len(body) - start if behaviour.announce is None else behaviour.announce
        if length:
            self.send_header('Content-Length', str(length))
        self.send_header('Content-Type', behaviour.content_type)
        self.send_header('Connection', 'close')
        if behaviour.etag:
            self.send_header('ETag', behaviour.etag)
        self.end_headers()
        time.sleep(behaviour.stall)
        cut = behaviour.cut.pop(0) if behaviour.cut else None
        end = len(body) if cut is None else min(len(body), start + cut)
        try:
            for at in range(start, end, behaviour.block):
                self.wfile.write(body[at : min(at + behaviour.block, end)])
                self.wfile.flush()
                time.sleep(behaviour.pause)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed, as some tests do
        self.close_connection = True


class Server:
    """A web server on this machine."""

    def __init__(self):
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        self.http.daemon_threads = True
        self.http.files = {}
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def base(self):
        return f'http://127.0.0.1:{self.http.server_port}'

    def put(self, path, **behaviour):
        self.http.files[path] = Behaviour(**behaviour)
        return self.http.files[path]

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server():
    """Web server whose files behave as told."""
    server = Server()
    yield server
    server.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Empty cache with quick retries and no settings from outside."""
    from mila_mm.weights.source import cache

    monkeypatch.setenv('MILA_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('MILA_MIRRORS', raising=False)
    monkeypatch.delenv('MILA_OFFLINE', raising=False)
    monkeypatch.setattr(cache._Configured, 'settings', cache.Settings(backoff=0.01, timeout=5.0, attempts=3))
    return tmp_path / 'home'


def recipe_weights(keys):
    """Draw a state dict for names and shapes, the same on every machine."""
    import torch

    rng, tensors = np.random.default_rng(2024), {}
    for name in sorted(keys):
        if name.endswith('num_batches_tracked'):
            tensors[name] = torch.zeros((), dtype=torch.int64)
            continue
        shape = keys[name]
        a = rng.standard_normal(shape).astype(np.float32)
        if name.endswith('running_var'):
            a = 1 + 0.1 * np.abs(a)
        elif name.endswith(('running_mean', 'bias')):
            a = 0.1 * a
        elif len(shape) == 1:
            a = 1 + 0.1 * a
        else:
            a = a / np.sqrt(np.prod(shape[1:]))
        tensors[name] = torch.from_numpy(np.asarray(a, np.float32))
    return OrderedDict((name, tensors[name]) for name in keys)


@pytest.fixture(scope='session')
def dense():
    """State dict of a micro dense backbone under the released names."""
    return recipe_weights(json.loads((PARITY / 'micro_dense_keys.json').read_text()))


@pytest.fixture(scope='session')
def classifier():
    """State dict of a micro ImageNet classifier as published, with its RoPE tables."""
    from mila_mm.weights.names import rope_tables

    weights = recipe_weights(json.loads((DATA / 'micro_classifier_keys.json').read_text()))
    weights.update(rope_tables(weights, '', 64))
    return weights


@pytest.fixture(scope='session')
def published(classifier):
    """Content of a published ImageNet file: the weights under 'model', beside leftovers of training."""
    return {'model': classifier, 'epoch': 299, 'max_accuracy': np.float64(83.5)}


@pytest.fixture(scope='session')
def published_bytes(published, tmp_path_factory):
    """Bytes of such a file, about 0.5 MB."""
    import torch

    path = tmp_path_factory.mktemp('published') / 'file.pth'
    torch.save(published, path)
    return path.read_bytes()


@pytest.fixture
def micro():
    """Arguments of the micro backbone."""
    return dict(arch=dict(MICRO_ARCH))


@pytest.fixture
def model(micro):
    """The micro backbone."""
    from mila_mm.models import MILA

    return MILA(**micro)


@pytest.fixture
def file(tmp_path):
    """Save content as a checkpoint."""
    import torch

    def save(content, name='file.pth', **kwargs):
        torch.save(content, tmp_path / name, **kwargs)
        return tmp_path / name

    return save


@pytest.fixture
def log():
    """Lines logged to mmengine's logger."""
    from mmengine.logging import MMLogger

    lines = []

    class Collect(logging.Handler):
        def emit(self, record):
            lines.append((record.levelname, record.getMessage()))

    handler = Collect()
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture(scope='session')
def detector():
    """Make a detector's state dict from a backbone's, and more tensors by name ('__' for '.')."""

    def make(dense, **heads):
        weights = OrderedDict((f'backbone.{name}', value) for name, value in dense.items())
        weights.update({name.replace('__', '.'): value for name, value in heads.items()})
        return weights

    return make


@pytest.fixture(scope='session')
def assert_holds():
    """Check that a module holds exactly these weights."""
    import torch

    def check(module, weights, prefix=''):
        own = module.state_dict()
        for name, value in weights.items():
            if prefix + name in own:
                torch.testing.assert_close(own[prefix + name], value, rtol=0, atol=0)

    return check
