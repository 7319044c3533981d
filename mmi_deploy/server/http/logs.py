"""Log of the server: one JSON object per line on stderr, never with contents of requests.

Lines are written by a thread: where nobody empties the pipe, lines are dropped and the server goes
on.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from queue import Full, Queue
from threading import Thread
from typing import Any

NAME = "mmi.server"
LEVELS = ("debug", "info", "warning", "error")

# Lines that wait for the reader of the log.
MOST_LINES = 10_000

# Seconds that the end of the process waits for them.
LAST_LINES = 1.0

STDERR = 2


class JsonFormatter(logging.Formatter):
    """A record as JSON: time, level, message, and the fields of `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class BackgroundHandler(logging.Handler):
    """Writes records in a thread; drops and counts them where they come faster than they are read.

    The thread uses the descriptor itself: one that hangs in a write of `sys.stderr` would hold its
    lock for ever, and with it the end of the process.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        super().__init__()
        self._write, self._dropped = write, 0
        self._lines: Queue[str] = Queue(MOST_LINES)
        Thread(target=self._run, name="mmi-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line."""
        try:
            self._lines.put_nowait(self.format(record))
        except Full:
            self._dropped += 1

    def flush(self) -> None:
        """Wait for the lines to be written, at most `LAST_LINES` seconds."""
        end = time.monotonic() + LAST_LINES
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)

    def _run(self) -> None:
        while True:
            line = self._lines.get()
            if self._dropped:
                lost = logging.makeLogRecord({"msg": "lines of the log were dropped"})
                lost.fields, self._dropped = {"lines": self._dropped}, 0
                lost.levelname = "WARNING"
                line = f"{self.format(lost)}\n{line}"
            try:
                self._write(f"{line}\n".encode())
            except OSError:  # a full disk, or nobody reads any more
                self._dropped += 1
            self._lines.task_done()


def write_all(data: bytes) -> None:
    """Write to stderr."""
    while data:
        data = data[os.write(STDERR, data) :]


def configure(level: str) -> logging.Logger:
    """Logger of the server; what uvicorn says beside it is kept if it is an error."""
    handler = BackgroundHandler(write_all)
    handler.setFormatter(JsonFormatter())
    for name, least in ((NAME, level.upper()), ("uvicorn", "ERROR"), ("asyncio", "ERROR")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
    return logging.getLogger(NAME)
