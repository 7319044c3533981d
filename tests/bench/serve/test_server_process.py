"""A server that is started for the benchmark and stopped after it."""

from __future__ import annotations

import os
import sys
import urllib.request
from pathlib import Path

import pytest

from mmi_bench.serve.server_process import served
from mmi_deploy.errors import MmiError

# A server that is ready at the third question, prints much, and notes its arguments and its end.
SERVER = """
import http.server, pathlib, signal, sys, threading
place, asked = pathlib.Path(sys.argv[0]).parent, []
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked.append(self.path)
        self.send_response(200 if len(asked) > 2 else 503)
        self.end_headers()
    def log_message(self, *_): print("x" * 5000, file=sys.stderr, flush=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
(place / "argv").write_text(" ".join(sys.argv[1:]))
def stop(*_):
    (place / "stopped").write_text("")
    threading.Thread(target=server.shutdown).start()
signal.signal(signal.SIGTERM, stop)
print("loading", flush=True)
print(f"Serving tiny at http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
server.serve_forever()
"""


def command(tmp_path: Path, code: str) -> list[str]:
    script = tmp_path / "server.py"
    script.write_text(code)
    return [sys.executable, str(script)]


def test_it_is_ready_when_the_block_begins_and_stopped_when_it_ends(tmp_path: Path) -> None:
    options = ["--slots", "2"]
    with served(Path("b"), options, command=command(tmp_path, SERVER)) as address:
        assert (tmp_path / "argv").read_text() == "b --port 0 --slots 2"
        for _ in range(50):  # more than a pipe holds
            with urllib.request.urlopen(f"{address}/v1/models", timeout=10) as answer:
                assert answer.status == 200
        assert not (tmp_path / "stopped").exists()
    assert (tmp_path / "stopped").exists()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{address}/v1/models", timeout=5)


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    code = "import sys; print('mmi: there is no bundle'); sys.exit(2)"
    with pytest.raises(MmiError, match="ended with exit code 2; got mmi: there is no bundle"):
        with served(Path("b"), [], command=command(tmp_path, code)):
            raise AssertionError("it never runs")


def test_it_is_stopped_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"):
        with served(Path("b"), [], command=command(tmp_path, SERVER)):
            raise RuntimeError("mine")
    assert (tmp_path / "stopped").exists()
    assert os.path.exists(tmp_path / "argv")
