"""HTTP/1.1 protocol: uvicorn's, with limits on the time and size of a request's head."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Bytes of a request line and its headers.
MOST_HEAD = 65_536


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
    """Connection that ends if the head of a request is not whole in time. `abort`, in the state of
    a request, drops the connection with what was not sent yet."""

    header_seconds = 20.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the first head."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the time."""
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Count the bytes of a new head."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Stop the time: the body has a limit of its own."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a head that never ends is refused."""
        continued = self._in_head
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if continued:  # else the data may hold the end of a body
            self._head_bytes += len(data)
        if self._head_bytes > MOST_HEAD:
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        elif self._head_timer is None:
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP in the shape of all errors."""
        self.transport.write(_INVALID)
        self.transport.close()

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
