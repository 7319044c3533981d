"""The official client against bytes in memory, a served model, and events without an engine."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import numpy as np
import openai
from PIL import Image

from mmi_deploy.batching.job import JobStats
from mmi_deploy.documents.images import Rgb
from mmi_deploy.documents.tokenizer import Tokenizer
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
from mmi_deploy.server.api.reply_context import ReplyContext
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import StreamRules
from mmi_deploy.spec.config import read_config
from mmi_deploy.spec.graphs import Limits

ASSETS = Path(__file__).resolve().parents[4] / "assets" / "tiny"
STEPS = 4

Result = TypeVar("Result")


def served_model() -> ServedModel:
    """The shipped model, without a bundle."""
    config = read_config(ASSETS / "config.json")
    return ServedModel(
        "tiny",
        config,
        Limits(context=config.llama.context, images=8),
        Tokenizer.open(ASSETS / "tokenizer.json", config.tokens),
        {"unipc:4": STEPS, "ddim:8": 8},
        "mmi-1a2b",
        1_795_905_000,
        "cpu",
    )


def picture(seed: int, side: int = 64) -> Rgb:
    """A picture of noise, uint8 [side, side, 3], which no encoder makes small."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def png(rgb: Rgb) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(rgb: Rgb) -> str:
    return "data:image/png;base64," + base64.b64encode(png(rgb)).decode()


def decoded(text: str) -> Rgb:
    """The picture whose file is `text` in base64."""
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
        return np.asarray(image.convert("RGB"))


def drawn(index: int, *, previews: int = 0, side: int = 64) -> list[Event]:
    """Events of a picture; its pixels are `picture(index)`."""
    steps: list[Event] = []
    for step in range(1, STEPS + 1):
        preview = picture(100 * index + step, 8) if step <= previews else None
        steps.append(ImageProgress(index, step, STEPS, preview))
    return [ImageStarted(index, STEPS), *steps, ImageDone(index, picture(index, side))]


def finished(tokens: int, images: int, reason: Reason = "end") -> Finished:
    timings = Timings([Timing("prefill", 0.25, 7), Timing("decode", 0.5, tokens)])
    return Finished(reason, tokens, images, timings)


async def happening(events: Iterable[Event | Exception]) -> AsyncIterator[Event]:
    """The events one after another; an error is raised at its place."""
    for event in events:
        await asyncio.sleep(0)
        if isinstance(event, Exception):
            raise event
        yield event


@dataclass
class Kept:
    """Pictures that were kept under a URL."""

    files: list[tuple[bytes, str]] = field(default_factory=list)

    def __call__(self, data: bytes, mime: str) -> str:
        self.files.append((data, mime))
        return f"/v1/mmi/images/{len(self.files) - 1}"


async def encode(rgb: Rgb, form: str, compression: int | None) -> bytes:
    buffer = io.BytesIO()
    quality = {} if compression is None or form == "png" else {"quality": compression}
    Image.fromarray(rgb).save(buffer, form.upper(), **quality)
    return buffer.getvalue()


def context_of(
    model: ServedModel,
    *,
    store: Callable[[bytes, str], str] | None = None,
    event_bytes: int = 65_536,
    cached: int = 3,
) -> ReplyContext:
    stats = JobStats(queued=0.125, first=0.2, total=1.5, given=9, cached=cached)
    return ReplyContext(
        model,
        StreamRules(event_bytes=event_bytes),
        "abc",
        1_795_905_001,
        encode,
        store or Kept(),
        lambda: stats,
    )


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in a loop of its own, also where a loop is running."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def run_stream(items: AsyncIterator[bytes]) -> list[bytes]:
    async def all_items() -> list[bytes]:
        return [item async for item in items]

    return run(all_items())


def messages_of(items: Iterable[bytes]) -> list[dict[str, Any]]:
    """Data of the events, after their frames were checked against the rules of streams."""
    found = []
    for event in b"".join(items).decode("ascii").split("\n\n")[:-1]:
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        found.append(value)
    return found


# How a network may cut the bytes of a stream.
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
    """Answers every request with what `answer` makes of its body; keeps the bodies.

    The clients validate every reply and every event strictly against their own types.
    """

    answer: Callable[[dict[str, Any]], dict[str, Any] | list[bytes]]
    cut: Cut = whole
    bodies: list[dict[str, Any]] = field(default_factory=list)

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        answer = self.answer(body)
        if isinstance(answer, dict):
            return httpx2.Response(200, json=answer)
        headers = {"content-type": "text/event-stream"}
        return httpx2.Response(200, headers=headers, stream=_Bytes(self.cut(b"".join(answer))))

    def client(self) -> openai.OpenAI:
        transport = httpx2.MockTransport(self.handle)
        return openai.OpenAI(
            api_key="-",
            base_url="http://mmi/v1",
            max_retries=0,
            http_client=httpx2.Client(transport=transport),
            _strict_response_validation=True,
        )

    def async_client(self) -> openai.AsyncOpenAI:
        transport = httpx2.MockTransport(self.handle)
        return openai.AsyncOpenAI(
            api_key="-",
            base_url="http://mmi/v1",
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=transport),
            _strict_response_validation=True,
        )


TEXT = "the red square moves down."


def text(*pieces: str, before: int = 0) -> list[Event]:
    """Events of a text in pieces, a token each; `before` were written."""
    return [TextDelta(piece, tokens=before + place + 1) for place, piece in enumerate(pieces)]
