"""What jobs under test meet on a machine: ports, other processes, a server that stops in the middle of a file."""

import os
import signal
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_STALLS = 60.0  # seconds


def stalling_server(reached: Path) -> str:
    """Serve a file of which most never comes; return its address.

    Args:
        reached: File to write once somebody waits for the rest.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header('Content-Length', str(1 << 20))
            self.end_headers()
            self.wfile.write(bytes(1 << 10))
            self.wfile.flush()
            reached.write_text(str(os.getpid()))
            threading.Event().wait(_STALLS)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_address[1]}/weights.pth'


def end(launcher: Any) -> None:
    """Leave nothing running of what a launcher has started in its session."""
    for pid in [*session(launcher.process.pid), launcher.process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.process.wait()


def session(leader: int) -> list[int]:
    """Return the processes of a session."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            words = stat.read_bytes().rpartition(b')')[2].split()
        except OSError:
            continue
        if int(words[3]) == leader:
            found.append(int(stat.parent.name))
    return found


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    """Tell whether somebody listens on a port, without asking there."""
    wanted = f':{port:04X}'
    lines = [line for name in ('tcp', 'tcp6') for line in Path(f'/proc/net/{name}').read_text().splitlines()[1:]]
    return any(words[1].endswith(wanted) and words[3] == '0A' for words in map(str.split, lines))
