"""Server with recorded answers, for states of the page that a real server reaches rarely.

It speaks the stream of `/v1/responses` as the real one does, with pictures drawn by Pillow. Set
`MockServer.scenario` to choose what the next request gets.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PAGE = Path(__file__).resolve().parents[4] / "mmi_deploy" / "server" / "page"
CSP = (
    "default-src 'self'; img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
SENTENCES = (
    "the red square moves down.",
    "the red square turns blue.",
    "the blue cross moves left.",
    "the blue square vanishes.",
)


@dataclass
class Scenario:
    """An answer. status, code, retry_after: of a refusal. pictures: drawn, each followed by a
    sentence. step: seconds of a denoising step. stop_after: events, after which `ending` comes:
    "lost" (the connection is cut), "failed" (an error event), "silent" (nothing for a minute)."""

    status: int = 200
    code: str = ""
    message: str = ""
    retry_after: int | None = None
    pictures: int = 2
    steps: int = 20
    step: float = 0.004
    word: float = 0.01
    sentences: tuple[str, ...] = SENTENCES
    stop_after: int | None = None
    ending: str = ""
    reason: str = "max_images"
    wait: float = 0.0
    side: int = 64


@dataclass
class MockServer:
    """A server on a free port of this machine. requests: bodies of `/v1/responses`, as bytes."""

    scenario: Scenario = field(default_factory=Scenario)
    ready: str = ""  # code of the answer of /health/ready; empty for ready
    documents: int = 0  # that it says to work on
    key: str = ""
    keep_alive: float = 15
    previews: bool = True
    limits: dict[str, int] = field(default_factory=dict)
    requests: list[bytes] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> MockServer:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def bodies(self) -> list[Any]:
        return [json.loads(body) for body in self.requests]


def drawn(index: int, side: int = 64) -> Image.Image:
    """The `index`-th picture that the mock server draws."""
    image = Image.new("RGB", (side, side), ["white", "#ffe9a8", "#d7ecff"][index % 3])
    draw = ImageDraw.Draw(image)
    unit = side // 8
    at = (1 + 2 * index) % 5 * unit
    draw.rectangle((at, unit, at + 2 * unit, 3 * unit), fill="#d8342c")
    top = (2 + 3 * index) % 5 * unit
    draw.ellipse((5 * unit, top, 7 * unit, top + 2 * unit), fill="#2f57d6")
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def preview(image: Image.Image, done: float, seed: int) -> bytes:
    """The picture as it looks when `done` of the steps are done."""
    image = image.resize((64, 64))
    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    soft = image.filter(ImageFilter.GaussianBlur(3 * (1 - done)))
    return png(Image.blend(Image.fromarray(noise), soft, 0.35 + 0.65 * done))


def events(server: MockServer, scenario: Scenario, body: Any) -> Iterator[tuple[float, Any]]:
    """(seconds to wait before it, event) of a response, without sequence numbers."""
    seed = body["mmi"]["seed"]
    response = {"id": "resp_1", "object": "response", "output": [], "mmi": {"seed": seed}}
    yield (
        scenario.wait,
        {"type": "response.created", "response": {**response, "status": "in_progress"}},
    )
    yield 0, {"type": "response.in_progress", "response": {**response, "status": "in_progress"}}
    content = body["input"][0]["content"]
    places = sum(part["type"] == "mmi.draw" for part in content)
    most = max(places, min(scenario.pictures, places + body["mmi"]["max_images"]))
    index = 0
    for picture in range(most):
        if picture >= places:  # words come before every picture that was not asked for
            sentence = scenario.sentences[picture % len(scenario.sentences)]
            yield from _words(scenario, index, sentence)
            index += 1
        place = picture if picture < places else None
        yield from _picture(server, scenario, index, picture, place, body)
        index += 1
    if most == places:
        yield from _words(scenario, index, scenario.sentences[-1])
    yield (
        0,
        {
            "type": "response.completed",
            "response": {
                **response,
                "status": "completed",
                "mmi": {"seed": seed, "reason": scenario.reason},
            },
        },
    )


def _words(scenario: Scenario, index: int, sentence: str) -> Iterator[tuple[float, Any]]:
    item = {"id": f"msg_{index}", "type": "message", "role": "assistant", "content": []}
    about = {"item_id": item["id"], "output_index": index, "content_index": 0}
    yield 0, {"type": "response.output_item.added", "output_index": index, "item": item}
    for number, word in enumerate(sentence.split(" ")):
        delta = f" {word}" if number else word
        yield scenario.word, {"type": "response.output_text.delta", **about, "delta": delta}
    yield 0, {"type": "response.output_text.done", **about, "text": sentence}
    yield 0, {"type": "response.output_item.done", "output_index": index, "item": item}


def _picture(
    server: MockServer, scenario: Scenario, index: int, number: int, place: int | None, body: Any
) -> Iterator[tuple[float, Any]]:
    call = "response.image_generation_call"
    seed = body["mmi"]["seed"]
    more = {"seed": seed, "steps": scenario.steps}
    if place is not None:
        more["place"] = place
    name = f"ig_{index}"
    about = {"item_id": name, "output_index": index}
    item = {
        "id": name,
        "type": "image_generation_call",
        "status": "in_progress",
        "result": None,
        "mmi": more,
    }
    image = drawn(number + seed % 1000, scenario.side)
    yield 0, {"type": "response.output_item.added", "output_index": index, "item": item}
    yield 0, {"type": f"{call}.in_progress", **about}
    partial = body["tools"][0]["partial_images"]
    shown = {scenario.steps * (k + 1) // (partial + 1) for k in range(partial)}
    for step in range(1, scenario.steps + 1):
        progress = {"step": step, "steps": scenario.steps}
        yield scenario.step, {"type": f"{call}.generating", **about, "mmi": progress}
        if step in shown:
            data = base64.b64encode(preview(image, step / scenario.steps, number)).decode()
            yield (
                0,
                {
                    "type": f"{call}.partial_image",
                    **about,
                    "partial_image_b64": data,
                    "partial_image_index": 0,
                    "output_format": "png",
                },
            )
    picture = f"{seed:08x}{number:024x}"
    server.pictures[picture] = png(image)
    yield 0, {"type": f"{call}.completed", **about}
    done = {
        **item,
        "status": "completed",
        "result": "",
        "mmi": {**more, "url": f"/v1/mmi/images/{picture}"},
    }
    yield 0, {"type": "response.output_item.done", "output_index": index, "item": done}


def _handler(server: MockServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing is logged."""

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path == "/" or path.startswith("/page/"):
                self.page("index.html" if path == "/" else path.removeprefix("/page/"))
            elif path == "/health/ready":
                if server.ready:
                    self.refuse(503, server.ready, "not ready")
                else:
                    self.json({"status": "ready", "documents": server.documents})
            elif not self.allowed():
                self.refuse(401, "invalid_api_key", "the key is missing or wrong")
            elif path == "/v1/models":
                limits = {
                    "images": 49,
                    "tokens": 700,
                    "image_bytes": 20 * 2**20,
                    "image_pixels": 64_000_000,
                    **server.limits,
                }
                mmi = {
                    "samplers": {"unipc:20": 20, "ddim:50": 50},
                    "sizes": ["64x64"],
                    "keep_alive": server.keep_alive,
                    "previews": server.previews,
                    "limits": limits,
                }
                self.json(
                    {"object": "list", "data": [{"id": "tiny", "object": "model", "mmi": mmi}]}
                )
            elif picture := server.pictures.get(path.removeprefix("/v1/mmi/images/")):
                self.answer(200, picture, "image/png")
            else:
                self.refuse(404, "not_found", "there is nothing here")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            scenario = server.scenario
            if not self.allowed():
                return self.refuse(401, "invalid_api_key", "the key is missing or wrong")
            server.requests.append(body)
            if scenario.status != 200:
                return self.refuse(
                    scenario.status, scenario.code, scenario.message, scenario.retry_after
                )
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            try:
                for number, (wait, event) in enumerate(events(server, scenario, json.loads(body))):
                    if number == scenario.stop_after:
                        return self.end_early(scenario)
                    time.sleep(wait)
                    self.event({**event, "sequence_number": number})
            except (BrokenPipeError, ConnectionResetError):
                server.cancelled.set()

        def end_early(self, scenario: Scenario) -> None:
            if scenario.ending == "failed":
                error = {"code": scenario.code, "message": scenario.message}
                self.event(
                    {"type": "response.failed", "response": {"status": "failed", "error": error}}
                )
            elif scenario.ending == "silent":
                for _ in range(600):
                    time.sleep(0.1)
                    self.wfile.write(b"")

        def event(self, event: Any) -> None:
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

        def allowed(self) -> bool:
            return not server.key or self.headers.get("Authorization") == f"Bearer {server.key}"

        def page(self, name: str) -> None:
            file = PAGE / name
            if "/" in name or not file.is_file():
                return self.refuse(404, "not_found", "there is no such file")
            self.answer(200, file.read_bytes(), TYPES[file.suffix], csp=True)

        def json(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), "application/json")

        def refuse(self, status: int, code: str, message: str, retry: int | None = None) -> None:
            error = {"message": message, "type": "error", "param": None, "code": code}
            self.answer(
                status, json.dumps({"error": error}).encode(), "application/json", retry=retry
            )

        def answer(
            self,
            status: int,
            body: bytes,
            kind: str,
            *,
            csp: bool = False,
            retry: int | None = None,
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Request-Id", self.headers.get("X-Request-Id") or "req-mock")
            if csp:
                self.send_header("Content-Security-Policy", CSP)
            if retry is not None:
                self.send_header("Retry-After", str(retry))
            self.end_headers()
            self.wfile.write(body)

    return Handler
