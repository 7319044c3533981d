"""HTTP/1.1 protocol: uvicorn's, with limits on the time and size of a request's head."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

# Bytes of a request line and its headers; also of what is in a body without being of it: trailers
# and extensions of chunks.
MOST_HEAD = 65_536

# Requests that may wait behind the one that is answered. Beyond, the connection is not read, and
# the end of the client not seen.
MOST_PIPELINED = 16


def _answer(status: str, code: str, message: str) -> bytes:
    """A whole response, for requests that never reach the application."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


_TOO_LARGE = _answer(
    "431 Request Header Fields Too Large",
    "headers_too_large",
    f"the headers are too large; at most {MOST_HEAD} bytes",
)
_INVALID = _answer("400 Bad Request", "invalid_http", "this is not a valid HTTP/1.1 request")


class Protocol(HttpToolsProtocol):
    """Connection that ends if the head of a request is not whole in time, if the rest of a body
    does not come after the answer, or if the client does not read the answer. `abort`, in the state
    of a request, drops the connection with what was not sent yet."""

    header_seconds = 20.0
    unread_seconds = 30.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head, self._in_body = True, False
        self._unanswered: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the first head."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the times, and tell all requests: uvicorn tells the last one alone."""
        self._stop_timer()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        super().connection_lost(exc)
        for cycle in self._waiting():
            cycle.disconnected = True
            cycle.message_event.set()

    def on_message_begin(self) -> None:
        """Count the bytes of a new head."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; trailers are of no use."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Stop the time: the body has a limit of its own."""
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()
        self._in_body = True
        self._unanswered = [*self._waiting(), self.cycle]
        if len(self.pipeline) <= MOST_PIPELINED:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End of a body."""
        self._in_body = False
        if not self._waiting():  # else the time is not that of the rest of a body
            self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the rest of the body, and for the client to read the answer."""
        super().on_response_complete()
        if self._in_body and self._head_timer is None:
            self._start_timer()
        if self._unread_timer is None:
            self._watch_reading(0)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a head that never ends is refused, and trailers that do not end."""
        continued = self._in_head or self._in_body
        self._head_bytes += len(data) if continued else 0  # else it may hold the end of a body
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._head_bytes > MOST_HEAD:
            self._refuse(_TOO_LARGE)
        elif self._in_head and self._head_timer is None:
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP in the shape of all errors."""
        self._refuse(_INVALID)

    def _refuse(self, answer: bytes) -> None:
        """Close the connection; with an answer, unless it would get into that of a request."""
        waiting = self._waiting()
        if self._in_body:
            own = waiting == [self.cycle] and not self.cycle.response_started
        else:
            own = not waiting
        if own:
            self.transport.write(answer)
        self.transport.close()

    def _waiting(self) -> list[RequestResponseCycle]:
        """Requests whose answers are not complete."""
        return [cycle for cycle in self._unanswered if not cycle.response_complete]

    def _watch_reading(self, before: int) -> None:
        """Drop the connection if the client has read nothing of `before` bytes for long."""
        self._unread_timer = None
        unread = self.transport.get_write_buffer_size()
        if unread and unread == before:
            self.transport.abort()
        elif unread:
            self._unread_timer = self.loop.call_later(
                self.unread_seconds, self._watch_reading, unread
            )

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
