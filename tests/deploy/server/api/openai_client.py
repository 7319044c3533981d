"""The official client against bytes in memory, and events of pictures and texts for it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2
import numpy as np
import openai
from PIL import Image

from deploy.server.api.served import data_url, file_of, random_picture
from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    Reason,
    TextDelta,
)
from mmi_deploy.runtime.timings import Timing, Timings

# Denoising steps of a picture.
STEPS = 4

TEXT = "the red square moves down."

Result = TypeVar("Result")


def picture(seed: int, side: int = 64) -> Rgb:
    """A picture of noise, uint8 [side, side, 3]."""
    return random_picture(seed, side, side)


def picture_url(seed: int, side: int = 64) -> str:
    """Data URL of `picture(seed, side)`."""
    return data_url(file_of(picture(seed, side)))


def decoded(text: str) -> Rgb:
    """The picture whose file is `text` in base64."""
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
        return np.asarray(image.convert("RGB"))


def text(*pieces: str, before: int = 0) -> list[Event]:
    """Events of a text in pieces, a token each; `before` were written."""
    return [TextDelta(piece, tokens=before + place + 1) for place, piece in enumerate(pieces)]


def drawn(index: int, *, previews: int = 0) -> list[Event]:
    """Events of the picture `picture(index)`; the preview of step s is `picture(100 index + s)`."""
    steps: list[Event] = []
    for step in range(1, STEPS + 1):
        preview = picture(100 * index + step, 8) if step <= previews else None
        steps.append(ImageProgress(index, step, STEPS, preview))
    return [ImageStarted(index, STEPS), *steps, ImageDone(index, picture(index))]


def finished(tokens: int, images: int, reason: Reason = "end") -> Finished:
    timings = Timings([Timing("prefill", 0.25, 7), Timing("decode", 0.5, tokens)])
    return Finished(reason, tokens, images, timings)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in a loop of its own, also where a loop is running."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def collect(items: AsyncIterator[bytes]) -> list[bytes]:
    """All items of a stream."""

    async def all_items() -> list[bytes]:
        return [item async for item in items]

    return run(all_items())


def messages_of(items: Iterable[bytes]) -> list[dict[str, Any]]:
    """Data of events, each of which must be a named event of one line of data."""
    found = []
    for event in b"".join(items).decode("ascii").split("\n\n")[:-1]:
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append(value)
    return found


def longest_line(items: Iterable[bytes]) -> int:
    """Bytes of the longest line."""
    return max(len(line) for line in b"".join(items).split(b"\n"))


# Pieces in which a network delivers the bytes of a stream.
Cut = Callable[[bytes], Sequence[bytes]]


def whole(data: bytes) -> list[bytes]:
    return [data]


def by_bytes(data: bytes) -> list[bytes]:
    return [data[place : place + 1] for place in range(len(data))]


class _Bytes(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pieces)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


@dataclass
class Server:
    """A server whose answer to a body is a JSON object or the items of a stream.

    Its clients validate every reply and every event strictly against their own types.
    """

    answer: Callable[[dict[str, Any]], dict[str, Any] | list[bytes]]
    cut: Cut = whole
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def client(self) -> openai.OpenAI:
        """A client, which asks once."""
        return openai.OpenAI(
            **_CLIENT, http_client=httpx2.Client(transport=httpx2.MockTransport(self._handle))
        )

    def async_client(self) -> openai.AsyncOpenAI:
        """An asynchronous client, which asks once."""
        return openai.AsyncOpenAI(
            **_CLIENT, http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(self._handle))
        )

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        answer = self.answer(body)
        if isinstance(answer, dict):
            return httpx2.Response(200, json=answer)
        headers = {"content-type": "text/event-stream"}
        return httpx2.Response(200, headers=headers, stream=_Bytes(self.cut(b"".join(answer))))


_CLIENT: dict[str, Any] = {
    "api_key": "-",
    "base_url": "http://mmi/v1",
    "max_retries": 0,
    "_strict_response_validation": True,
}
