"""Bodies of requests, and what replies to them hold."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
from PIL import Image

from mmi_deploy.documents.images import Rgb

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
IMAGES = "/v1/images/generations"

TEXT = "the red square moves down."


def picture(seed: int, side: int = 64) -> Rgb:
    """A picture of noise, uint8 [side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def png(rgb: Rgb) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes | Rgb, kind: str = "image/png") -> str:
    file = data if isinstance(data, bytes) else png(data)
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def rgb_of(file: bytes) -> Rgb:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def rgb_of_url(url: str) -> Rgb:
    """Pixels of a data URL."""
    return rgb_of(base64.b64decode(url.partition(",")[2], validate=True))


def content(*parts: str | Rgb | None) -> list[dict[str, Any]]:
    """Parts of a message: texts, pictures, and None to draw."""

    def part(one: str | Rgb | None) -> dict[str, Any]:
        if one is None:
            return {"type": "mmi.draw"}
        if isinstance(one, str):
            return {"type": "text", "text": one}
        return {"type": "image_url", "image_url": {"url": data_url(one)}}

    return [part(one) for one in parts]


def chat(
    *parts: str | Rgb | None,
    tokens: int = 8,
    images: int = 0,
    seed: int = 7,
    mmi: dict[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A request of a chat completion."""
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content(*(parts or (TEXT,)))}],
        "max_completion_tokens": tokens,
        "seed": seed,
        "mmi": {"max_images": images, **(mmi or {})},
        **fields,
    }


def long_text(tokens: int = 400, **fields: Any) -> dict[str, Any]:
    """A request whose reply takes a while: exactly so many tokens."""
    return chat(TEXT, tokens=tokens, ignore_eos=True, **fields)


def many_pictures(count: int = 40, seed: int = 7, **fields: Any) -> dict[str, Any]:
    """A request whose reply takes long: pictures with a word between them."""
    return chat(TEXT, tokens=400, images=count, seed=seed, mmi={"turn_tokens": 1}, **fields)


def events_of(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Data of the events of a stream, up to `[DONE]`."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def reply_of(events: Sequence[dict[str, Any]]) -> tuple[str, list[Rgb]]:
    """Text and pictures of the chunks of a chat."""
    deltas = [choice["delta"] for event in events for choice in event.get("choices", ())]
    text = "".join(delta.get("content") or "" for delta in deltas)
    urls: dict[int, str] = {}
    for image in (image for delta in deltas for image in delta.get("images", ())):
        urls[image["index"]] = urls.get(image["index"], "") + image["image_url"]["url"]
    return text, [rgb_of_url(urls[index]) for index in sorted(urls)]


# What no answer may hold: an address in memory, a path of a file, a line of a stack.
LEAK = re.compile(
    r"0x[0-9a-fA-F]{6,}|/(?:home|usr|tmp|work|root|var|proc)/|Traceback|\.py\b|site-packages"
)


def check_error(response: httpx.Response, status: int | None = None) -> dict[str, Any]:
    """The error of a response, in OpenAI's shape, with the headers of all errors."""
    if status is not None:
        assert response.status_code == status, response.text
    return check_error_body(response.content, dict(response.headers), response.status_code)


def check_error_body(body: bytes, headers: dict[str, str], status: int) -> dict[str, Any]:
    found = json.loads(body)
    assert set(found) == {"error"}
    error = found["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and 0 < len(error["message"]) <= 500
    assert isinstance(error["type"], str) and isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert not LEAK.search(body.decode()), body
    assert headers["content-type"] == "application/json"
    if status in (429, 503):
        assert headers["x-should-retry"] == "true"
        assert 1 <= int(headers["retry-after"]) <= 60
    elif status not in (400, 431) or "x-request-id" in headers:
        assert headers["x-should-retry"] == "false"
    return error
