"""An engine process that computes nothing: the seed of a request says what happens, unless
`MMI_SCRIPT=answer` is in the environment: then all are answered."""

from __future__ import annotations

import os
import socket
import sys
import time
from enum import IntEnum
from threading import Event as Flag
from threading import Lock, Thread
from typing import Any

import numpy as np

from deploy.server.requests import picture
from mmi_deploy.batching.job import JobStats
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.server.engine.messages import LENGTHS, Arrays, lengths, pack, pack_event, unpack

SLOTS = 4

ANSWER_ALL = os.environ.get("MMI_SCRIPT") == "answer"

# Side of a picture whose PNG has 1.5 MB, and the number of pictures of `FLOOD`.
LARGE, FLOODED = 720, 40


class Script(IntEnum):
    """Course of a document."""

    ANSWER = 1  # a text, at once
    HANG = 2  # nothing, until it is cancelled
    DIE = 3  # the process ends before the first event
    DIE_LATER = 4  # the process ends after a text
    LARGE_PICTURE = 5
    FLOOD = 6  # many large pictures, as fast as can be
    TEXTS = 7  # 20,000 texts, as fast as can be
    SLOW = 8  # a text every 0.2 s, ten times
    FAIL = 9  # an error with a path and an address in its message
    PICTURE_THEN_HANG = 10


class Engine:
    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.lock = sock, Lock()
        self.cancelled: dict[int, Flag] = {}

    def send(self, header: dict[str, Any], arrays: Arrays | None = None) -> None:
        with self.lock:
            self.sock.sendall(pack(header, arrays))

    def emit(self, number: int, event: Event | Exception) -> None:
        arrays = Arrays()
        stats = JobStats(0.25, 0.5, 1.0, 7, 3)
        packed = [number, *pack_event(event, stats, arrays)]
        self.send({"type": "events", "events": [packed]}, arrays)

    def play(self, number: int, seed: int) -> None:
        emit, cancelled = (lambda event: self.emit(number, event)), self.cancelled[number]
        tokens = images = 0
        match Script(seed) if seed in set(Script) and not ANSWER_ALL else Script.ANSWER:
            case Script.ANSWER:
                emit(TextDelta("one two", (), 2))
                tokens = 2
            case Script.HANG:
                cancelled.wait()
            case Script.DIE:
                os._exit(7)
            case Script.DIE_LATER:
                emit(TextDelta("one", (), 1))
                time.sleep(0.3)
                os._exit(7)
            case Script.LARGE_PICTURE:
                emit(ImageStarted(0, 4))
                emit(ImageProgress(0, 2, 4))
                emit(ImageDone(0, picture(0, LARGE)))
                images = 1
            case Script.FLOOD:
                while images < FLOODED and not cancelled.is_set():
                    emit(ImageDone(images, picture(images, LARGE)))
                    images += 1
            case Script.TEXTS:
                while tokens < 20_000 and not cancelled.is_set():
                    tokens += 1
                    emit(TextDelta(" word", (), tokens))
            case Script.SLOW:
                while tokens < 10 and not cancelled.wait(0.2):
                    tokens += 1
                    emit(TextDelta(" word", (), tokens))
            case Script.FAIL:
                emit(ValueError(f"no file /usr/share/secret at {hex(id(self))}"))
                return
            case Script.PICTURE_THEN_HANG:
                emit(ImageDone(0, np.zeros((64, 64, 3), np.uint8)))
                images = 1
                cancelled.wait()
        reason = "cancelled" if cancelled.is_set() else "end"
        emit(Finished(reason, tokens, images, Timings()))

    def run(self) -> None:
        file = self.sock.makefile("rb")

        def read(count: int) -> bytes:
            data = file.read(count)
            if len(data) < count:
                os._exit(0)
            return data

        while True:
            text, data = lengths(read(LENGTHS.size))
            header, _ = unpack(read(text), read(data))
            match header["type"]:
                case "open":
                    found = {"pid": os.getpid(), "slots": SLOTS, "kernels": ""}
                    self.send({"type": "ready", "text_gap_bound": 0.1, **found})
                case "submit":
                    number = header["id"]
                    self.cancelled[number] = Flag()
                    seed = header["options"].get("seed", 0)
                    Thread(target=self.play, args=(number, seed), daemon=True).start()
                case "cancel":
                    self.cancelled[header["id"]].set()


if __name__ == "__main__":
    Engine(socket.socket(fileno=int(sys.argv[1]))).run()
