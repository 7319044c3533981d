"""Pictures under URLs: kept for a while, within a budget of bytes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from threading import Lock

# Path of a picture's URL before its id.
PATH = "/v1/mmi/images/"


@dataclass(frozen=True)
class Picture:
    """An encoded picture. tenant: may fetch it. expires: time of the clock."""

    data: bytes
    mime: str
    tenant: str
    expires: float


class PictureStore:
    """Encoded pictures by random ids; the oldest one goes first. Thread-safe."""

    def __init__(
        self, seconds: float, most_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds, self._most, self._clock = seconds, most_bytes, clock
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self.bytes = 0
        self._lock = Lock()

    def put(self, data: bytes, mime: str, tenant: str) -> str:
        """Keep a picture; returns the path of its URL."""
        now = self._clock()
        name = token_hex(16)  # 128 random bits: nobody guesses another client's
        with self._lock:
            self._pictures[name] = Picture(data, mime, tenant, now + self._seconds)
            self.bytes += len(data)
            self._evict(now)
        return PATH + name

    def get(self, name: str, tenant: str) -> Picture | None:
        """The picture of an id; None if it is unknown, too old or another tenant's."""
        with self._lock:
            self._evict(self._clock())
            picture = self._pictures.get(name)
        return picture if picture is not None and picture.tenant == tenant else None

    def _evict(self, now: float) -> None:
        while self._pictures:
            oldest = next(iter(self._pictures.values()))
            if oldest.expires > now and self.bytes <= self._most:
                return
            self._pictures.popitem(last=False)
            self.bytes -= len(oldest.data)
