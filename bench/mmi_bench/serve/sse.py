"""Server-sent events out of byte chunks, without a limit of the line length."""

from __future__ import annotations


class EventReader:
    """Splits chunks of a stream at blank lines and returns the data of whole events.

    Lines end with LF or CRLF. Comments and fields other than `data` are skipped; several `data`
    lines of an event are joined by LF.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0  # bytes at the front in which no line end was found
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """Add a chunk; returns the data of each event that is whole now."""
        self._buffer += chunk
        found: list[bytes] = []
        begun = 0
        while (end := self._buffer.find(b"\n", max(begun, self._searched))) >= 0:
            line = bytes(self._buffer[begun:end]).removesuffix(b"\r")
            begun = end + 1
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data, self._data = b"\n".join(self._data), []
                found.append(data)
        del self._buffer[:begun]
        self._searched = len(self._buffer)
        return found

    @property
    def unfinished(self) -> bool:
        """True if the stream broke off inside an event."""
        return bool(self._data or self._buffer)
