"""Engine process: a batch engine behind a socket.

The front process owns it. When the front ends, however that happens, the socket closes and this
process exits; so does it when the front is killed while Python is stuck in a run (Linux).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from queue import SimpleQueue
from threading import Thread
from typing import Any

from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.event_stream import EventStream, Waiter
from mmi_deploy.batching.scheduler import Policy
from mmi_deploy.bundle.bundle import Bundle
from mmi_deploy.documents.document import Document, Text
from mmi_deploy.errors import BundleError, MmiError
from mmi_deploy.runtime.backend import find_kernel_library
from mmi_deploy.runtime.events import Event, Finished, ImageProgress
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.server.engine.messages import (
    LENGTHS,
    Arrays,
    lengths,
    pack,
    pack_event,
    unpack,
    unpack_document,
    unpack_options,
)
from mmi_deploy.server.engine.open_options import OpenOptions, bundle_digest
from mmi_deploy.system.memory import is_out_of_memory, out_of_memory

# An event of a document, or the error that ends it; at its end, the statistics.
Item = tuple[int, Event | Exception, Any]

# Tenant of documents of the engine's own; no client's prompt shares their prefix.
OWN = "engine"


class Connection:
    """Socket to the front. Events are packed and sent by a thread of its own, while runs go on."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._file = sock.makefile("rb")
        self._outbox: SimpleQueue[bytes | list[Item]] = SimpleQueue()
        self._pending: list[Item] = []  # events since the last run
        Thread(target=self._send, name="mmi-sender", daemon=True).start()

    def receive(self) -> tuple[dict[str, Any], Arrays]:
        """Wait for a message. Raises `EOFError` when the front has closed the socket."""
        text, data = lengths(self._read(LENGTHS.size))
        return unpack(self._read(text), self._read(data))

    def send(self, header: dict[str, Any]) -> None:
        """Send a message."""
        self._outbox.put(pack(header))

    def post(self, item: Item) -> None:
        """Send an event at once. Thread-safe."""
        self._outbox.put([item])

    def add(self, item: Item) -> None:
        """Add an event, which is sent by the next `flush`. Of the thread of the runs alone."""
        self._pending.append(item)

    def flush(self) -> None:
        """Send the events that were added, in one message."""
        pending, self._pending = self._pending, []
        if pending:
            self._outbox.put(pending)

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def _send(self) -> None:
        while True:
            message = self._outbox.get()
            if not isinstance(message, bytes):
                arrays = Arrays()
                events = [
                    [number, *pack_event(event, stats, arrays)] for number, event, stats in message
                ]
                message = pack({"type": "events", "events": events}, arrays)
            try:
                self._socket.sendall(message)
            except OSError:
                os._exit(0)  # the front is gone


class RemoteStream(EventStream):
    """Stream whose events go to the front."""

    def __init__(self, number: int, connection: Connection, end: Callable[[int], object]) -> None:
        """number: the front's, of the document. end: called with it at the document's end."""
        super().__init__()
        self._number, self._connection, self._end = number, connection, end
        self._finished: Finished | None = None

    def emit(self, item: Event | Exception | None) -> None:
        """Pass an event on; the last one together with the statistics."""
        if isinstance(item, Finished):
            self._finished = item
            return
        last = item is None or isinstance(item, Exception)
        if last:
            self._end(self._number)
        event = self._finished if item is None else item
        assert event is not None, "a document ends with `Finished` or an error"
        self._connection.add((self._number, event, self.stats if last else None))

    def wake(self) -> list[Waiter]:
        """Send what was emitted since the last run; nobody waits here."""
        self._connection.flush()
        return []


def run(descriptor: int) -> None:
    """Serve the front process at the other end of a socket until it closes."""
    _die_with_parent()
    # Ctrl-C and SIGTERM of a process group are the front's to handle: it drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(socket.socket(fileno=descriptor))
    try:
        _serve(connection)
    except EOFError:
        os._exit(0)  # at once: a run may take seconds


def _serve(connection: Connection) -> None:
    header, _ = connection.receive()
    options = OpenOptions(**header["options"])
    # The front may go while the engine loads, which nobody would notice otherwise.
    inbox: SimpleQueue[tuple[dict[str, Any], Arrays]] = SimpleQueue()
    Thread(target=_receive, args=(connection, inbox), name="mmi-receiver", daemon=True).start()
    try:
        engine = open_engine(options)
    except Exception as error:
        refusal = out_of_memory("for the engine") if is_out_of_memory(error) else error
        if not isinstance(refusal, MmiError):
            raise
        connection.send({"type": "refused", "error": str(refusal)})
        _wait_for_the_end(inbox)
        return
    _first_documents(engine)
    connection.send({"type": "ready", **description(engine, options)})
    streams: dict[int, RemoteStream] = {}
    while True:
        header, arrays = inbox.get()
        match header["type"]:
            case "submit":
                _submit(engine, connection, streams, header, arrays)
            case "cancel":
                if stream := streams.get(header["id"]):
                    stream.cancel()
            case "stats":
                stats = plain(asdict(engine.stats()))
                connection.send({"type": "stats", "id": header["id"], "stats": stats})
            case "drain":
                engine.drain()


def _receive(connection: Connection, inbox: SimpleQueue[tuple[dict[str, Any], Arrays]]) -> None:
    """Receive messages; the end of the connection is the end of the process."""
    try:
        while True:
            inbox.put(connection.receive())
    except (EOFError, OSError):
        os._exit(0)


def _wait_for_the_end(inbox: SimpleQueue[tuple[dict[str, Any], Arrays]]) -> None:
    while True:
        inbox.get()


def open_engine(options: OpenOptions) -> BatchEngine:
    bundle = Bundle.open(options.bundle, unproved=options.unproved)
    if options.digest and bundle_digest(bundle.folder, options.target) != options.digest:
        raise BundleError(
            f"the bundle {options.bundle} has changed since the server was started",
            fix="start the server again",
        )
    return BatchEngine.open(
        bundle,
        slots=options.slots,
        image_memory=options.image_memory,
        policy=Policy(**options.policy),
        target=options.target,
        kernels=options.kernels,
        threads=options.threads,
        device=options.device,
        resident=options.resident,
        unproved=options.unproved,
    )


def _first_documents(engine: BatchEngine) -> None:
    """Write two tokens and begin a picture, so that no client waits for what the first document
    alone does: the tokenizer's and the samplers' tables, the shapes of a short prompt."""
    document = Document((Text("a"),))
    for _ in engine.submit(document, GenerationOptions(max_tokens=2, max_images=0), tenant=OWN):
        pass
    drawing = engine.submit(document, GenerationOptions(draw_first=True, previews=1), tenant=OWN)
    for event in drawing:
        if isinstance(event, ImageProgress):
            drawing.cancel()


def description(engine: BatchEngine, options: OpenOptions) -> dict[str, Any]:
    """Description of an engine that is ready, for the front."""
    stats = engine.stats()
    return {
        "pid": os.getpid(),
        "slots": stats.slots,
        "text_gap_bound": stats.text_gap_bound,
        "kernels": _kernels(options),
    }


def _kernels(options: OpenOptions) -> str:
    """Digest of the kernel library; empty without one."""
    library = find_kernel_library(options.target, options.kernels)
    return "" if library is None else sha256(library.read_bytes()).hexdigest()


def _submit(
    engine: BatchEngine,
    connection: Connection,
    streams: dict[int, RemoteStream],
    header: dict[str, Any],
    arrays: Arrays,
) -> None:
    number = header["id"]
    stream = RemoteStream(number, connection, lambda number: streams.pop(number, None))
    streams[number] = stream
    try:
        engine.submit(
            unpack_document(header["parts"], arrays),
            unpack_options(header["options"]),
            max_seconds=header["max_seconds"],
            tenant=header["tenant"],
            stream=stream,
        )
    except Exception as error:  # a refusal is the document's, and must not end the process
        del streams[number]
        connection.post((number, error, None))


def plain(stats: dict[str, Any]) -> dict[str, Any]:
    """Statistics without infinities, which JSON does not have."""
    return json.loads(json.dumps(stats), parse_constant=lambda _: None)


def _die_with_parent() -> None:
    """Let Linux kill this process when the front dies."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    run(int(sys.argv[1]))
