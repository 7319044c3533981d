"""Server that speaks the wire contract with known timings, in a thread of its own.

Its output depends on the request alone: words and a grey level from a hash of the last text and the
seed. Steps of a reply: seconds to sleep, text, or the start, progress and end of a picture.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

from mmi_bench.serve.wire import quick_png

WORDS = ("red", "green", "blue", "square", "circle", "moves", "left", "down")


@dataclass
class Mock:
    """Behaviour of the server. first, gap, step: seconds before the first output, between tokens
    and of each denoising step; a picture has `steps`. slots: requests at once. spoil: called with a
    grey level and the requests in flight, returns another one. fault: called with the number of a
    request, returns None, a status, or "error" or "cut" for a stream that breaks after two words.
    """

    first: float = 0.02
    gap: float = 0.005
    step: float = 0.01
    steps: int = 3
    slots: int = 1000
    progress: bool = True
    spoil: Callable[[int, int], int] = lambda level, flying: level
    fault: Callable[[int], int | str | None] = lambda number: None
    piece: int | None = None  # bytes of a write; None for whole events
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    writes: list[list[float]] = field(default_factory=list)  # perf_counter before each, by request
    flying: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Plan:
    """Amounts that a request asks for: pictures at once, then turns of tokens and a picture."""

    now: int
    tokens: int
    pictures: int
    words: list[str]
    level: int


def plan_of(body: dict[str, Any]) -> Plan:
    """Read a chat or a Responses body."""
    mmi = body.get("mmi", {})
    messages = body.get("messages") or body["input"]
    parts = [part for message in messages for part in message["content"]]
    text = json.dumps([part.get("text") for part in parts])
    seed = body.get("seed", mmi.get("seed"))
    digest = hashlib.sha256(f"{text}{seed}".encode()).digest()
    tokens = body.get("max_completion_tokens", body.get("max_output_tokens"))
    pictures = mmi.get("max_images", 0)
    if "turn_tokens" in mmi:
        tokens = mmi["turn_tokens"]
    words = [WORDS[byte % len(WORDS)] for byte in digest] * 32
    now = sum(part["type"] == "mmi.draw" for part in parts)
    return Plan(now, tokens, pictures, words, digest[0] // 2 + 10)


def steps_of(plan: Plan, mock: Mock) -> Iterator[tuple[str, Any]]:
    """Steps of a reply."""
    yield "sleep", mock.first
    words, index = iter(plan.words), 0

    def picture(index: int) -> Iterator[tuple[str, Any]]:
        yield "start", index
        for step in range(mock.steps):
            yield "sleep", mock.step
            yield "progress", (index, step + 1)
        level = mock.spoil(plan.level + index, mock.flying)
        yield "image", (index, quick_png(np.full((16, 16, 3), level, np.uint8)))

    for _ in range(plan.now):
        yield from picture(index)
        index += 1
    for turn in range(max(1, plan.pictures)):
        for token in range(plan.tokens):
            if token or turn or index:
                yield "sleep", mock.gap
            yield "text", f"{next(words)} "
        if turn < plan.pictures:
            yield from picture(index)
            index += 1


class Chat:
    """Events of a chat stream."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.transport = body.get("mmi", {}).get("image_transport", "inline")
        self.progress = bool(body.get("mmi", {}).get("progress"))
        self.tokens = self.images = 0

    def _chunk(self, **fields: Any) -> bytes:
        usage = {
            "prompt_tokens": 9,
            "completion_tokens": self.tokens + 17 * self.images,
            "completion_tokens_details": {
                "text_tokens": self.tokens,
                "image_tokens": 17 * self.images,
            },
        }
        value = {"object": "chat.completion.chunk", "choices": [], "usage": usage, **fields}
        return f"data: {json.dumps(value)}\n\n".encode()

    def _delta(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        return self._chunk(choices=[{"index": 0, "delta": delta, "finish_reason": reason}])

    def text(self, text: str) -> Iterator[bytes]:
        self.tokens += 1
        yield self._delta({"content": text})

    def start(self, index: int) -> Iterator[bytes]:
        if self.progress:
            yield self._chunk(mmi={"type": "image.started", "index": index, "steps": 3})

    def step(self, index: int, step: int) -> Iterator[bytes]:
        if self.progress:
            yield self._chunk(mmi={"type": "image.progress", "index": index, "step": step})

    def image(self, index: int, file: bytes) -> Iterator[bytes]:
        self.images += 1
        url = f"data:image/png;base64,{base64.b64encode(file).decode()}"
        if self.transport == "url":
            url = f"/v1/mmi/images/{file.hex()}"
        pieces = [url]
        if self.transport == "chunked":
            pieces = [url[start : start + 40] for start in range(0, len(url), 40)]
        for number, piece in enumerate(pieces):
            whole = {"type": "image_url", "mmi": {"offset": 0}} if number == 0 else {}
            yield self._delta({"images": [{"index": index, "image_url": {"url": piece}, **whole}]})

    def end(self) -> Iterator[bytes]:
        mmi = {"reason": "max_tokens", "queue_seconds": 0.25, "stage_seconds": {"decode": 0.5}}
        yield self._chunk(
            choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}],
            mmi=mmi,
        )
        yield self._chunk()
        yield b"data: [DONE]\n\n"


class Responses:
    """Events of a Responses stream."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.tokens = self.images = 0
        self.item = 0

    @staticmethod
    def _event(kind: str, **fields: Any) -> bytes:
        value = {"type": f"response.{kind}", **fields}
        return f"event: response.{kind}\ndata: {json.dumps(value)}\n\n".encode()

    def text(self, text: str) -> Iterator[bytes]:
        if not self.tokens:
            yield self._event("created", response={"status": "in_progress"})
        self.tokens += 1
        yield self._event("output_text.delta", item_id="msg_0", delta=text)

    def start(self, index: int) -> Iterator[bytes]:
        yield self._event("image_generation_call.in_progress", item_id=f"ig_{index}")

    def step(self, index: int, step: int) -> Iterator[bytes]:
        name = f"ig_{index}"
        yield self._event(
            "image_generation_call.generating", item_id=name, mmi={"step": step, "steps": 3}
        )
        if step == 1:
            yield self._event(
                "image_generation_call.partial_image", item_id=name, partial_image_b64="AAAA"
            )

    def image(self, index: int, file: bytes) -> Iterator[bytes]:
        self.images += 1
        item = {
            "id": f"ig_{index}",
            "type": "image_generation_call",
            "result": base64.b64encode(file).decode(),
        }
        yield self._event("output_item.done", item=item)

    def end(self) -> Iterator[bytes]:
        usage = {"output_tokens": self.tokens, "output_tokens_details": {"reasoning_tokens": 0}}
        response = {"status": "completed", "usage": usage, "mmi": {"reason": "end"}}
        yield self._event("completed", response=response)


@contextmanager
def running(mock: Mock) -> Iterator[Mock]:
    """The server on a free port; `mock.url` is its address."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    stop: list[asyncio.Event] = []

    async def serve() -> None:
        stop.append(asyncio.Event())
        slots = asyncio.Semaphore(mock.slots)

        async def generate(request: web.Request) -> web.StreamResponse:
            body = await request.json()
            number = len(mock.bodies)
            mock.bodies.append(body)
            mock.paths.append(request.path)
            fault = mock.fault(number)
            if isinstance(fault, int):
                error = {"message": "the queue is full", "code": "queue_full"}
                return web.json_response({"error": error}, status=fault)
            mock.flying += 1
            mock.peak = max(mock.peak, mock.flying)
            try:
                async with slots:
                    return await answer(request, body, fault)
            finally:
                mock.flying -= 1

        async def answer(
            request: web.Request, body: dict[str, Any], fault: str | None
        ) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            response.headers["x-request-id"] = f"id-{len(mock.bodies)}"
            await response.prepare(request)
            writer = Chat(body) if "messages" in body else Responses(body)

            async def send(events: Iterator[bytes]) -> None:
                for event in events:
                    size = mock.piece or len(event)
                    for start in range(0, len(event), size):
                        await response.write(event[start : start + size])

            words, writes, due = 0, [], asyncio.get_running_loop().time()
            mock.writes.append(writes)
            for kind, value in steps_of(plan_of(body), mock):
                if kind == "sleep":  # until a time, so that late wake-ups do not add up
                    due += value
                    await asyncio.sleep(due - asyncio.get_running_loop().time())
                    continue
                writes.append(time.perf_counter())
                if kind == "text":
                    await send(writer.text(value))
                    words += 1
                    if words == 2 and fault == "error":
                        error = {"error": {"message": "the engine died", "code": "engine_died"}}
                        await send(iter([f"data: {json.dumps(error)}\n\n".encode()]))
                    if words == 2 and fault:
                        return response
                elif kind == "start":
                    await send(writer.start(value))
                elif kind == "progress":
                    await send(writer.step(*value))
                else:
                    await send(writer.image(*value))
            await send(writer.end())
            return response

        async def picture(request: web.Request) -> web.Response:
            await asyncio.sleep(mock.step)
            return web.Response(body=bytes.fromhex(request.match_info["id"]))

        async def models(_: web.Request) -> web.Response:
            entry = {"id": "mock", "root": "mock", "mmi": {"target": "cpu"}}
            return web.json_response({"object": "list", "data": [entry]})

        async def ready_now(_: web.Request) -> web.Response:
            return web.json_response({"status": "ready"})

        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", generate)
        app.router.add_post("/v1/responses", generate)
        app.router.add_get("/v1/mmi/images/{id}", picture)
        app.router.add_get("/v1/models", models)
        app.router.add_get("/health/ready", ready_now)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        mock.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop[0].wait()
        await runner.cleanup()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10), "the mock server does not start"
    try:
        yield mock
    finally:
        loop.call_soon_threadsafe(stop[0].set)
        thread.join(10)
