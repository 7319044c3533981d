"""Response of a generation: one JSON, or a stream that begins with the first event.

The status line is sent when the first event exists: until then an error is a real 4xx or 5xx. A
client that leaves, or that does not read, ends its documents.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from mmi_deploy.errors import MmiError
from mmi_deploy.server.api.errors import ApiError, api_error_of
from mmi_deploy.server.http.error_response import error_response
from mmi_deploy.server.http.observed_events import ObservedEvents
from mmi_deploy.server.settings import StreamRules

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx passes every event on at once
)

# Seconds between two looks at a stream, for keep-alives and for clients that do not read.
LOOK = 0.5


class GenerationResponse(Response):
    """Reply to one request, whose documents are in the engines already."""

    def __init__(
        self,
        documents: Sequence[ObservedEvents],
        *,
        reply: Callable[[], Any],
        stream: Callable[[], AsyncIterator[bytes]] | None,
        failure: Callable[[ApiError], bytes],
        keep_alive: bytes,
        rules: StreamRules,
    ) -> None:
        """reply: makes the coroutine of the whole JSON. stream: makes the events, if the client
        asked for them. failure: what ends a stream that has begun with a keep-alive. keep_alive:
        what is sent in silence."""
        super().__init__()
        self._documents, self._reply, self._stream = documents, reply, stream
        self._failure, self._keep_alive, self._rules = failure, keep_alive, rules
        self._started = False
        self._sent = self._sending = 0.0  # times of the loop; 0: not sending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; returns early if the client leaves."""
        loop = asyncio.get_running_loop()
        self._sent = loop.time()
        work = loop.create_task(self._send_events(send) if self._stream else self._send_reply(send))
        watchers = [loop.create_task(self._left(receive, work))]
        if self._stream:
            watchers.append(loop.create_task(self._look(scope, send, work)))
        try:
            await work
        except asyncio.CancelledError:
            if not work.cancelled():  # the server is stopped, and not this work by a watcher
                work.cancel()
                raise
        except (ApiError, MmiError) as error:
            await error_response(api_error_of(error))(scope, receive, send)
        finally:
            for watcher in watchers:
                watcher.cancel()
            for document in self._documents:
                document.cancel("error")
            scope["state"]["facts"].update(
                reason=",".join(sorted({document.reason for document in self._documents})),
                tokens=sum(document.tokens for document in self._documents),
                images=sum(document.images for document in self._documents),
            )

    async def _send_reply(self, send: Send) -> None:
        reply = await self._reply()
        response = JSONResponse(reply)
        start, body = response.raw_headers, response.body
        await send({"type": "http.response.start", "status": 200, "headers": start})
        await send({"type": "http.response.body", "body": body})

    async def _send_events(self, send: Send) -> None:
        assert self._stream is not None
        try:
            await self._documents[0].first()
            async for event in self._stream():
                await self._write(send, event)
        except (ApiError, MmiError) as error:
            if not self._started:
                raise
            # After a keep-alive it is too late for a status.
            await self._write(send, self._failure(api_error_of(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, event: bytes) -> None:
        loop = asyncio.get_running_loop()
        if (start := self._start()) is not None:
            await send(start)
        self._sending = loop.time()
        await send({"type": "http.response.body", "body": event, "more_body": True})
        self._sent, self._sending = loop.time(), 0.0

    def _start(self) -> Message | None:
        if self._started:
            return None
        self._started = True
        return {"type": "http.response.start", "status": 200, "headers": list(HEADERS)}

    async def _left(self, receive: Receive, work: asyncio.Task[None]) -> None:
        """Wait until the client leaves; then end its documents."""
        while (await receive())["type"] != "http.disconnect":
            pass
        for document in self._documents:
            document.cancel("client")
        work.cancel()

    async def _look(self, scope: Scope, send: Send, work: asyncio.Task[None]) -> None:
        """Send keep-alives in silence, and drop a client that does not read."""
        loop, rules = asyncio.get_running_loop(), self._rules
        while True:
            await asyncio.sleep(LOOK)
            now = loop.time()
            if self._sending:
                waiting = sum(document.waiting_bytes for document in self._documents)
                late = now - self._sending > rules.slow_client
                if late or waiting > rules.buffer_bytes:
                    for document in self._documents:
                        document.cancel("slow_client")
                    work.cancel()
                    scope.get("state", {}).get("abort", lambda: None)()
                    return
            elif rules.keep_alive and now - self._sent > rules.keep_alive and self._keep_alive:
                with suppress(OSError):
                    await self._write(send, self._keep_alive)
