"""`mmi serve` as a process of its own, on a free port: its address, log, processes and memory.

What the command line does not offer, such as shorter times, comes as constants that are set before
the command runs. A scripted engine can take the place of the real one, see scripted_engine.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import httpx

TESTS = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join(str(path) for path in (TESTS.parent, TESTS))

SCRIPTED_ENGINE = "deploy.server.scripted_engine"

# Runs the command in an environment that the tests decide: `settings` are defaults of
# `ServerSettings`, `constants` are attributes of modules by their full name, and `engine` is the
# module to run in the engine process.
_PRELUDE = """
import functools, importlib, json, subprocess, sys
told = json.loads(sys.argv.pop(1))
for name, value in told["constants"].items():
    module, _, attribute = name.rpartition(".")
    setattr(importlib.import_module(module), attribute, value)
if told["settings"]:
    from mmi_deploy.server import settings
    settings.ServerSettings = functools.partial(settings.ServerSettings, **told["settings"])
if told["engine"]:
    from mmi_deploy.server.engine import client
    popen = subprocess.Popen
    def start(command, **options):
        return popen([sys.executable, "-m", told["engine"], command[-1]], **options)
    subprocess.Popen = start
from mmi_deploy.cli.app import run
sys.exit(run(sys.argv[1:]))
"""


def wait_until(true: Callable[[], Any], seconds: float = 20.0, every: float = 0.02) -> Any:
    """Wait for something that is true, and return it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(every)
    return found


class ServerProcess:
    """One server; a `with` block ends it."""

    def __init__(
        self,
        bundle: Path,
        *options: object,
        settings: Mapping[str, Any] | None = None,
        constants: Mapping[str, Any] | None = None,
        engine: str | None = None,
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
        read_log: bool = True,
    ) -> None:
        """wait: until it is ready. read_log: empty the pipe of its log from the start."""
        told = {"settings": settings or {}, "constants": constants or {}, "engine": engine}
        command = [sys.executable, "-c", _PRELUDE, json.dumps(told), "serve", str(bundle)]
        command += ["--port", "0", "--name", "tiny", *map(str, options)]
        variables = {**os.environ, "PYTHONPATH": PYTHONPATH, **(environment or {})}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers: list[Thread] = []
        self._read(self.process.stdout, self.out)
        if read_log:
            self.read_log()
        if wait:
            self.wait_ready()

    def _read(self, stream: Any, lines: list[str]) -> None:
        reader = Thread(target=_collect, args=(stream, lines), daemon=True)
        reader.start()
        self._readers.append(reader)

    def read_log(self) -> None:
        """Begin to empty the pipe of the log."""
        self._read(self.process.stderr, self.err)

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Wait until it has said its address."""

        def said() -> bool:
            assert self.process.poll() is None, "".join(self.err)
            return bool(self.out)

        wait_until(said, seconds)

    @property
    def address(self) -> str:
        """As printed: `http://127.0.0.1:PORT`."""
        return self.out[0].split()[-1]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    # Requests.

    def client(self, **options: Any) -> httpx.Client:
        """A client with connections of its own."""
        return httpx.Client(base_url=self.address, timeout=60, trust_env=False, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, **({"json": body} if body is not None else {}), **options)

    def connect(self) -> socket.socket:
        """A connection without HTTP."""
        sock = socket.create_connection(("127.0.0.1", self.port), 10)
        sock.settimeout(10)
        return sock

    def exchange(self, data: bytes) -> bytes:
        """Send bytes; returns what comes until the server closes."""
        with self.connect() as sock:
            sock.sendall(data)
            return read_all(sock)

    # State.

    def metrics(self) -> dict[str, float]:
        """Values by name with labels."""
        lines = self.get("/metrics", headers=self.authorization).text.splitlines()
        pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
        return {name: float(value) for name, _, value in pairs}

    authorization: Mapping[str, str] = {}

    @property
    def log(self) -> list[dict[str, Any]]:
        """The JSON lines so far."""
        return [json.loads(line) for line in self.err if line.startswith("{")]

    def logged(self, request_id: str) -> dict[str, Any]:
        """The line about a request."""
        return wait_until(
            lambda: next((one for one in self.log if one.get("request_id") == request_id), None)
        )

    @property
    def engines(self) -> list[int]:
        """Process ids of the engines."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split() if not _is_zombie(int(pid))]

    def memory(self, pid: int | None = None) -> int:
        """RssAnon + VmSwap in bytes, of the front process by default."""
        status = Path(f"/proc/{pid or self.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))

    # The end.

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 30.0) -> int:
        """Wait for the end; returns the exit code."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()


def _collect(stream: Any, lines: list[str]) -> None:
    for line in stream:
        lines.append(line)


def _is_zombie(pid: int) -> bool:
    return not is_alive(pid)


def is_alive(pid: int) -> bool:
    """True for a process that exists and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def read_all(sock: socket.socket) -> bytes:
    """Read until the other side closes or resets."""
    data = bytearray()
    try:
        while piece := sock.recv(65_536):
            data += piece
    except ConnectionResetError:
        pass
    return bytes(data)


def read_response(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one response of a declared length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(65_536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.partition(b":")[2])
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += sock.recv(65_536)
    [response] = responses_of(head + b"\r\n\r\n" + body)
    return response


def request_bytes(
    path: str, body: bytes = b"", *headers: str, method: str = "POST", host: str = "localhost"
) -> bytes:
    """A request as bytes, with the usual headers."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    if body or method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode("latin-1") + body


def responses_of(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of the responses in `data`, one after another."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while True:
                size, _, data = data.partition(b"\r\n")
                count = int(size or b"0", 16)
                body += data[:count]
                data = data[count + 2 :]
                if not count:
                    break
        else:
            count = int(headers.get("content-length", "0"))
            body, data = data[:count], data[count:]
        found.append((int(first.split()[1]), headers, body))
    return found
