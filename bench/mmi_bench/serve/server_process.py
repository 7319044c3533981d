"""A server of a bundle, started for the benchmark and stopped after it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmi_deploy.errors import MmiError
from mmi_deploy.system.progress import Progress, silent

# Seconds until the address is printed (large engines load for minutes before), until the server is
# ready, and to stop.
_START, _READY, _STOP = 900.0, 900.0, 60.0

_LOOK = 0.1

# Lines of its output that an error shows.
_LINES = 20

_ADDRESS = re.compile(r"https?://[0-9A-Za-z.\-\[\]:]*:\d+")


@contextmanager
def served(
    bundle: Path,
    options: Sequence[str],
    progress: Progress = silent,
    command: Sequence[str] = (sys.executable, "-m", "mmi_deploy", "serve"),
) -> Iterator[str]:
    """Address of a server of `bundle`, started with `options` on a free port and ready.

    It gets SIGTERM at the end. Raises `MmiError` if it ends, or is not ready in time.
    """
    process = subprocess.Popen(
        [*command, str(bundle), "--port", "0", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    output = _Output(process)
    try:
        progress("starting the server")
        address = _wait_for_address(process, output)
        _wait_until_ready(process, output, address, progress)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        output.close()


class _Output:
    """Lines that a process prints: read all the time, so that it never waits for a reader."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: deque[str] = deque(maxlen=_LINES)
        self.address: str | None = None
        self._pipe = process.stdout
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._pipe or ():
            self.lines.append(line.rstrip())
            found = _ADDRESS.search(line)
            if found and self.address is None:
                self.address = found[0]

    def close(self) -> None:
        self._thread.join(1)
        if self._pipe and not self._thread.is_alive():
            self._pipe.close()

    def error(self, what: str) -> MmiError:
        self._thread.join(0.5)
        return MmiError(what, got=" | ".join(self.lines) or "no output")


def _wait_for_address(process: subprocess.Popen[str], output: _Output) -> str:
    end = time.monotonic() + _START
    while output.address is None:
        if process.poll() is not None:
            raise output.error(f"the server ended with exit code {process.returncode}")
        if time.monotonic() > end:
            raise output.error(f"the server has printed no address within {_START:.0f} s")
        time.sleep(_LOOK)
    return output.address


def _wait_until_ready(
    process: subprocess.Popen[str], output: _Output, address: str, progress: Progress
) -> None:
    end = time.monotonic() + _READY
    while not _is_ready(address):
        if process.poll() is not None:
            raise output.error(f"the server ended with exit code {process.returncode}")
        if time.monotonic() > end:
            raise output.error(f"the server is not ready after {_READY:.0f} s")
        progress("waiting until the server is ready")
        time.sleep(_LOOK)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
