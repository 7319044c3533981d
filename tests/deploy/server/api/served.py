"""The tiny model as the front process knows it, events without an engine, and pictures."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
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
from mmi_deploy.server.settings import RequestLimits, StreamRules
from mmi_deploy.spec.config import read_config
from mmi_deploy.spec.graphs import Limits

ASSETS = Path(__file__).resolve().parents[4] / "assets" / "tiny"
LIMITS = RequestLimits()
STEPS = {"unipc:20": 20, "ddim:8": 8}


@cache
def tiny(context: int = 512, images: int = 49) -> ServedModel:
    """The model in assets/tiny, with the limits of a bundle."""
    config = read_config(ASSETS / "config.json")
    tokenizer = Tokenizer.open(ASSETS / "tokenizer.json", config.tokens)
    limits = Limits(context=context, batch=8, images=images, pool=128)
    return ServedModel("tiny", config, limits, tokenizer, STEPS, "mmi-1a2b", 1_700_000_000, "cpu")


def random_picture(seed: int, height: int = 64, width: int = 64) -> Rgb:
    """Noise, which no format makes small."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_of(rgb: Rgb, kind: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format=kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    """A data URL of a file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def pixels_of(url: str) -> Rgb:
    """The picture of a data URL."""
    data = base64.b64decode(url.split(",", 1)[1], validate=True)
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class Surroundings:
    """A context of replies that encodes at once and keeps pictures in `stored`."""

    def __init__(self, cached: int = 0, event_bytes: int = 65_536) -> None:
        self.stored: list[tuple[bytes, str]] = []
        self.context = ReplyContext(
            model=tiny(),
            rules=StreamRules(event_bytes=event_bytes),
            request_id="abc",
            created=1_795_905_000,
            encode=self._encode,
            store=self._store,
            stats=lambda: JobStats(0.25, 0.5, 1.5, 24, cached),
        )

    async def _encode(self, rgb: Rgb, kind: str, quality: int | None) -> bytes:
        await asyncio.sleep(0)
        return file_of(rgb, kind.upper(), **({} if quality is None else {"quality": quality}))

    def _store(self, data: bytes, mime: str) -> str:
        self.stored.append((data, mime))
        return f"/v1/mmi/images/{len(self.stored) - 1}"


def told(
    parts: Iterable[str | Rgb],
    reason: Reason = "end",
    *,
    given: int = 0,
    pieces: Callable[[str], Iterable[str]] = lambda text: [text],
    previews: Mapping[int, Rgb] | None = None,
    steps: int = 3,
) -> list[Event]:
    """Events of a reply of texts and pictures. given: images of the document before it."""
    events: list[Event] = []
    tokens = images = 0
    for part in parts:
        if isinstance(part, str):
            for piece in pieces(part):
                tokens += 1
                events.append(TextDelta(piece, tokens=tokens))
            continue
        index = given + images
        events.append(ImageStarted(index, steps))
        for step in range(1, steps + 1):
            preview = (previews or {}).get(step)
            events.append(ImageProgress(index, step, steps, preview))
        events.append(ImageDone(index, part))
        images += 1
    runs = [Timing("prefill", 0.5, 24), Timing("decode", 0.25, 1), Timing("decode", 0.25, 1)]
    return [*events, Finished(reason, tokens, images, Timings(runs))]


async def each(events: Iterable[Event | Exception]) -> AsyncIterator[Event]:
    """The events one after another; an exception is raised at its place."""
    for event in events:
        await asyncio.sleep(0)
        if isinstance(event, Exception):
            raise event
        yield event


def streamed(module: Any, request: Any, events: Iterable[Event | Exception], context: Any) -> bytes:
    """All bytes of a stream."""
    return b"".join(items_of(module, request, events, context))


def items_of(
    module: Any, request: Any, events: Iterable[Event | Exception], context: Any
) -> list[bytes]:
    """The items of a stream."""

    async def read() -> list[bytes]:
        return [item async for item in module.stream(request, each(events), context)]

    return asyncio.run(read())


def replied(
    module: Any, request: Any, events: Iterable[Event | Exception], context: Any
) -> dict[str, Any]:
    """The whole reply."""
    found: dict[str, Any] = asyncio.run(module.reply(request, each(events), context))
    return found
