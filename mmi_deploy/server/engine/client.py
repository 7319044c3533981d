"""Engine client: the front's side of one engine process, which it starts, restarts and ends."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any, Literal

from mmi_deploy.batching.job import JobStats
from mmi_deploy.documents.document import Document
from mmi_deploy.errors import EngineError, MmiError
from mmi_deploy.runtime.events import Event, ImageProgress, TextDelta
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.server.engine.messages import (
    LENGTHS,
    Arrays,
    lengths,
    pack,
    pack_document,
    pack_options,
    unpack,
    unpack_event,
)
from mmi_deploy.server.engine.open_options import OpenOptions

# starting: loads and warms up. ready. restarting: it died, and is started again. failed: it will
# not come back. closed: on purpose.
State = Literal["starting", "ready", "restarting", "failed", "closed"]

# Seconds before the first, second, ... restart; the last counts for all later ones.
BACK_OFF = (1.0, 2.0, 4.0)

# Restarts within this many seconds after which the engine is given up.
MOST_RESTARTS, WINDOW = 5, 600.0


class EngineDied(EngineError):
    """The engine process ended while it had the document."""


@dataclass(frozen=True)
class Readiness:
    """Description of an engine that is ready. slots: documents at once. kernels: digest of the
    kernel library. text_gap_bound: seconds that a running text waits at most, None if unbounded."""

    pid: int
    slots: int
    text_gap_bound: float | None
    kernels: str


class RemoteEvents:
    """Events of one document, read by one coroutine.

    What is not read yet is merged, so that a slow reader costs little: adjacent texts become one,
    and only the latest progress of a picture is kept, unless it has a preview.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._items: deque[Event | MmiError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.ended = False
        self.stats: JobStats | None = None
        self.bytes = 0  # of pictures that wait to be read

    def put(self, item: Event | MmiError, last: bool) -> None:
        """Add an event, or the error that ends the document."""
        self.ended = self.ended or last
        waiting = self._items[-1] if self._items else None
        match (waiting, item):
            case (TextDelta(), TextDelta()):
                text, logprobs = waiting.text + item.text, waiting.logprobs + item.logprobs
                self._items[-1] = replace(item, text=text, logprobs=logprobs)
            case (ImageProgress(preview=None), ImageProgress()):
                self._items[-1] = item
            case _:
                self._items.append(item)
                self.bytes += _size(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """End the document within one run."""
        if not self.ended:
            self._cancel()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._items:
            if self.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._items.popleft()
        self.bytes -= _size(item)
        if isinstance(item, MmiError):
            raise item
        return item


def _size(item: Event | MmiError) -> int:
    rgb = getattr(item, "rgb", None)
    return 0 if rgb is None else int(rgb.nbytes)


class EngineClient:
    """One engine process. All methods are called in the event loop of the front."""

    def __init__(
        self,
        options: OpenOptions,
        changed: Callable[[EngineClient], None],
        say: Callable[[str], None],
    ) -> None:
        """changed: called when the state has changed. say: takes a line for the log."""
        self.options, self._changed, self._say = options, changed, say
        self.state: State = "starting"
        self.ready: Readiness | None = None
        self.refusal = ""  # of the process to open the bundle
        self.restarts = 0
        self.last_message = 0.0  # time of the loop
        self._open: dict[int, RemoteEvents] = {}
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = count()
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def documents(self) -> int:
        """Documents that it has, running and waiting."""
        return len(self._open)

    def start(self) -> None:
        """Start the process; `state` says when it is ready."""
        self._task = asyncio.get_running_loop().create_task(self._supervise())

    def submit(
        self, document: Document, options: GenerationOptions, *, max_seconds: float, tenant: str
    ) -> RemoteEvents:
        """Send a document. Raises `EngineError` unless the process is ready."""
        if self.state != "ready" or self._writer is None:
            raise EngineError("the engine is not ready")
        number, writer = next(self._numbers), self._writer
        if not self._open:  # silence counts from now on
            self.last_message = asyncio.get_running_loop().time()
        events = RemoteEvents(lambda: self._send(writer, {"type": "cancel", "id": number}))
        self._open[number] = events
        arrays = Arrays()
        header = {
            "type": "submit",
            "id": number,
            "parts": pack_document(document, arrays),
            "options": pack_options(options),
            "max_seconds": max_seconds,
            "tenant": tenant,
        }
        self._send(writer, header, arrays)
        return events

    async def stats(self, seconds: float = 2.0) -> Mapping[str, Any] | None:
        """Statistics of the batch engine; None if it does not answer in time."""
        if self.state != "ready" or self._writer is None:
            return None
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        self._send(self._writer, {"type": "stats", "id": number})
        try:
            return await asyncio.wait_for(answer, seconds)
        except (TimeoutError, EngineDied):
            return None
        finally:
            self._asked.pop(number, None)

    def drain(self) -> None:
        """Let the running documents finish and refuse those that wait."""
        if self._writer is not None:
            self._send(self._writer, {"type": "drain"})

    def cancel_all(self) -> None:
        """End all documents within one run."""
        for events in list(self._open.values()):
            events.cancel()

    async def close(self) -> None:
        """End the process at once."""
        self._enter("closed")
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._end_process()
        self._fail_all()

    def kill(self) -> None:
        """End the process without waiting for it."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _supervise(self) -> None:
        """Start the process, and again after each death, until it refuses or dies too often."""
        loop = asyncio.get_running_loop()
        deaths: deque[float] = deque(maxlen=MOST_RESTARTS)
        while True:
            try:
                await self._live()
            finally:
                code = self._end_process()
                self._writer = None
            if self.refusal:
                self._say(f"the engine cannot be opened: {self.refusal}")
                self._enter("failed")
                self._fail_all()
                return
            self._say(f"the engine process ended unexpectedly ({_cause(code)})")
            now = loop.time()
            if len(deaths) == MOST_RESTARTS and now - deaths[0] < WINDOW:
                self._say(f"it died {MOST_RESTARTS + 1} times in {WINDOW:g} s and stays down")
                self._enter("failed")
                self._fail_all()
                return
            recent = sum(now - death < WINDOW for death in deaths)
            deaths.append(now)
            self._enter("restarting")
            self._fail_all()
            self.restarts += 1
            await asyncio.sleep(BACK_OFF[min(recent, len(BACK_OFF) - 1)])

    async def _live(self) -> None:
        """One life of the process; returns at its end."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "mmi_deploy.server.engine.process"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,  # of libraries: the front's own output is for people
            )
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours, limit=2**22)
        self._writer = writer
        try:
            self._send(writer, {"type": "open", "options": asdict(self.options)})
            while True:
                text, data = lengths(await reader.readexactly(LENGTHS.size))
                header = await reader.readexactly(text)
                self._receive(*unpack(header, await reader.readexactly(data) if data else b""))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except Exception as error:  # a message of a process that is out of its mind
            self._say(f"a message of the engine process cannot be read ({type(error).__name__})")
        finally:
            writer.close()

    def _receive(self, header: dict[str, Any], arrays: Arrays) -> None:
        self.last_message = asyncio.get_running_loop().time()
        match header["type"]:
            case "events":
                for number, *packed in header["events"]:
                    item, stats, last = unpack_event(packed, arrays)
                    events = self._open.pop(number, None) if last else self._open.get(number)
                    if events is not None:
                        events.stats = stats
                        events.put(item, last)
            case "stats":
                answer = self._asked.get(header["id"])
                if answer is not None and not answer.done():
                    answer.set_result(header["stats"])
            case "ready":
                self.ready = Readiness(
                    *(header[name] for name in ("pid", "slots", "text_gap_bound", "kernels"))
                )
                self._enter("ready")
            case "refused":
                self.refusal = header["error"]
                raise ConnectionError

    def _enter(self, state: State) -> None:
        if self.state != "closed":
            self.state = state
            self._changed(self)

    def _fail_all(self) -> None:
        """End the documents that were in the process."""
        lost, self._open = self._open, {}
        for events in lost.values():
            events.put(EngineDied("the engine process died"), last=True)
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(EngineDied("the engine process died"))

    def _end_process(self) -> int | None:
        """Kill the process if it runs; returns its exit code."""
        self.kill()
        return self._process.wait() if self._process is not None else None

    @staticmethod
    def _send(
        writer: asyncio.StreamWriter, header: Mapping[str, Any], arrays: Arrays | None = None
    ) -> None:
        if not writer.is_closing():
            writer.write(pack(header, arrays))


def _cause(code: int | None) -> str:
    """End of a process in words."""
    if code is not None and code < 0:
        return f"signal {-code}"
    return f"exit code {code}"
