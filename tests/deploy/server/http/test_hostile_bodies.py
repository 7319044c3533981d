"""Bodies that no client should send: the right status in OpenAI's shape, soon, and no leak."""

from __future__ import annotations

import gzip
import io
import json
import struct
import time
import zlib
from threading import Thread
from typing import Any

import httpx
import pytest
from PIL import Image

from deploy.server.requests import (
    CHAT,
    COMPLETIONS,
    IMAGES,
    RESPONSES,
    chat,
    check_error,
    data_url,
    picture,
    png,
)
from deploy.server.server_process import ServerProcess

JSON = {"content-type": "application/json"}
POSTS = (CHAT, COMPLETIONS, RESPONSES, IMAGES, "/tokenize", "/detokenize")


def post(server: ServerProcess, path: str, body: bytes, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.post(path, content=body, headers={**JSON, **names})


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny", "prompt": "the r',
        b'{"model": "tiny"} trailing',
        b'"text"',
        b"[1, 2]",
        b"null",
        b'{"model": NaN}',
        b'{"seed": Infinity}',
        b'{"seed": -Infinity}',
        b'{"seed": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "model": "tiny"}',
        b'{"mmi": {"seed": 1, "seed": 2}}',
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"\xff\xfe{\x00}\x00",
        b'{"model": "\xff"}',
        b'{"model": "a\x00b"}',
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_a_json_object_is_refused(
    server: ServerProcess, path: str, body: bytes
) -> None:
    error = check_error(post(server, path, body), 400)
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"],
)
def test_other_content_types_are_refused(server: ServerProcess, path: str, kind: str) -> None:
    # A page of another site can send these without asking first.
    response = server.post(
        path, content=json.dumps(chat()).encode(), headers={"content-type": kind}
    )
    check_error(response, 415)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity"])
def test_compressed_bodies_are_refused(server: ServerProcess, encoding: str) -> None:
    body = gzip.compress(json.dumps(chat()).encode())
    check_error(post(server, CHAT, body, content_encoding=encoding), 415)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_may_be_named_in_other_words(server: ServerProcess, kind: str) -> None:
    body = json.dumps({"model": "tiny", "prompt": "the red"}).encode()
    response = server.post("/tokenize", content=body, headers={"content-type": kind})
    assert response.status_code == 200, response.text


HUGE = 10**30


@pytest.mark.parametrize(
    "fields",
    [
        {"max_completion_tokens": HUGE},
        {"max_completion_tokens": -1},
        {"max_completion_tokens": 0},
        {"max_completion_tokens": 1.5},
        {"max_completion_tokens": "8"},
        {"max_completion_tokens": True},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": HUGE},
        {"temperature": -0.1},
        {"temperature": 1e300},
        {"temperature": 1e-300},
        {"top_p": 0},
        {"top_p": 2},
        {"top_k": -2},
        {"top_k": HUGE},
        {"n": 2},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"999999999": 1}},
        {"logit_bias": {"1": 1e300}},
        {"stop": [""]},
        {"stop": ["a"] * 1000},
        {"stop": "\ud800"},
        {"mmi": {"guidance": -1}},
        {"mmi": {"guidance": 1e300}},
        {"mmi": {"max_images": HUGE}},
        {"mmi": {"max_images": 1000}},
        {"mmi": {"turn_tokens": HUGE}},
        {"mmi": {"full_every": 0}},
        {"mmi": {"max_seconds": 0}},
        {"mmi": {"max_seconds": 1e300}},
        {"mmi": {"schedule": "../../etc/passwd"}},
        {"mmi": {"schedule": "unipc:1000000"}},
        {"mmi": {"partial_images": 4, "progress": True}},
        {"messages": []},
        {"messages": [{}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "the"}] * 10_000}]},
        {"messages": [{"role": "user", "content": "the"}] * 10_000},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": "the " * 300_000}]},
        {"messages": [{"role": "user", "content": "the " * 2000}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"unknown": 1},
        {"a" * 100_000: 1},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"modalities": []},
        {"modalities": ["audio"]},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
@pytest.mark.timing
def test_values_out_of_range_are_refused_and_named(
    server: ServerProcess, fields: dict[str, Any]
) -> None:
    body = json.dumps({**chat(), **fields}).encode()
    begun = time.monotonic()
    error = check_error(post(server, CHAT, body), 400)
    assert time.monotonic() - begun < 2
    if "content" not in str(fields):  # the length of all messages together has no one field
        assert error["param"], error


def test_the_model_must_be_the_served_one(server: ServerProcess) -> None:
    for path, body in ((CHAT, chat()), (IMAGES, {"prompt": "the"})):
        error = check_error(server.post(path, {**body, "model": "../../etc"}), 404)
        assert error["code"] == "model_not_found"


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def bomb(side: int = 30_000) -> bytes:
    """A PNG of 40 kB or so that says to have side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(40_000_000), 9)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


GIF_BOMB = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";"
WEBP_BOMB = (
    b"RIFF"
    + struct.pack("<I", 30)
    + b"WEBPVP8X"
    + struct.pack("<I", 10)
    + b"\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff"
    + b"\x00" * 8
)
BMP_BOMB = (
    b"BM"
    + struct.pack("<IHHI", 54, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
)

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
NOISE = png(picture(1))


@pytest.mark.parametrize(
    "file",
    [
        bomb(),
        GIF_BOMB,
        WEBP_BOMB,
        BMP_BOMB,
        SVG,
        b"",
        b"\x00" * 100,
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        NOISE[:100],
        NOISE[: len(NOISE) // 2],
        NOISE[:40] + b"\xff" * 100 + NOISE[140:],
        b"II*\x00" + b"\xff" * 64,
        b"\xff\xd8\xff\xe0" + b"\x00" * 64,
        b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\x00" * 30,
        b"\x00\x00\x00\x0cjP  \r\n\x87\n" + b"\x00" * 64,
        b"8BPS\x00\x01" + b"\x00" * 64,
    ],
    ids=lambda file: repr(file[:12]),
)
@pytest.mark.timing
def test_bad_pictures_are_refused_without_a_word_of_the_decoder(
    server: ServerProcess, file: bytes
) -> None:
    image = {"type": "image_url", "image_url": {"url": data_url(file)}}
    body = {**chat(), "messages": [{"role": "user", "content": [image]}]}
    server.post(CHAT, chat(tokens=1))  # connections and threads are warm
    before, begun = server.memory(), time.monotonic()
    error = check_error(server.post(CHAT, body), 400)
    assert time.monotonic() - begun < 1
    assert server.memory() - before < 8 * 2**20
    assert error["param"] == "messages[0].content[0].image_url.url"
    check_error(
        server.post(
            RESPONSES,
            {
                "model": "tiny",
                "input": [
                    {
                        "role": "user",
                        "content": [{"type": "input_image", "image_url": data_url(file)}],
                    }
                ],
            },
        ),
        400,
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a",
        "//example.com/a.png",
        "/etc/passwd",
        "gopher://127.0.0.1:6379/_INFO",
        "javascript:alert(1)",
        "",
        "data:",
        "data:,",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:text/html;base64,PGI+",
        "data:image/png;base64,****",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AAAA AAAA",
        "data:image/png;base64,\u00e9",
        "data:image/png;base64,file:///etc/passwd",
    ],
)
def test_only_data_urls_of_pictures_are_taken(server: ServerProcess, url: str) -> None:
    image = {"type": "image_url", "image_url": {"url": url}}
    body = {**chat(), "messages": [{"role": "user", "content": [image]}]}
    error = check_error(server.post(CHAT, body), 400)
    assert error["code"] in (
        "remote_images_off",
        "invalid_image_url",
        "invalid_base64",
        "invalid_image",
    )


@pytest.mark.timing
def test_a_body_above_the_limit_is_refused_while_it_comes(server: ServerProcess) -> None:
    url = "data:image/png;base64," + "QUJD" * (133 * 2**20 // 4)
    image = {"type": "image_url", "image_url": {"url": url}}
    body = json.dumps({**chat(), "messages": [{"role": "user", "content": [image]}]}).encode()
    before, begun = server.memory(), time.monotonic()
    error = check_error(post(server, CHAT, body), 413)
    assert error["code"] == "body_too_large"
    assert time.monotonic() - begun < 10
    assert server.memory() - before < 32 * 2**20
    assert "QUJDQUJD" not in "".join(server.err)


def test_a_body_that_says_its_length_later_is_refused_at_the_limit(server: ServerProcess) -> None:
    def endless() -> Any:
        for _ in range(80):
            yield b" " * 2**20

    before = server.memory()
    response = server.post(CHAT, content=endless(), headers=JSON)
    assert check_error(response, 413)["code"] == "body_too_large"
    # What was read lay in memory once.
    assert server.memory() - before < 96 * 2**20


def test_a_picture_above_its_limit_is_refused_before_it_is_decoded(server: ServerProcess) -> None:
    url = "data:image/png;base64," + "QUJD" * (21 * 2**20 // 3)
    image = {"type": "image_url", "image_url": {"url": url}}
    body = {**chat(), "messages": [{"role": "user", "content": [image]}]}
    assert check_error(server.post(CHAT, body), 400)["code"] == "image_too_large"


@pytest.mark.timing
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_a_small_body_with_a_large_picture_does_not_hold_up_others(
    server: ServerProcess, path: str
) -> None:
    """63 million pixels of one colour take some hundred bytes as WebP, and a second to decode."""
    buffer = io.BytesIO()
    Image.new("RGB", (16_000, 3_900)).save(buffer, "WEBP", lossless=True)
    file = buffer.getvalue()
    image = {"type": "image_url", "image_url": {"url": data_url(file, "image/webp")}}
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": [image]}]}
    assert len(json.dumps(body)) < 4000
    answers: list[httpx.Response] = []
    sender = Thread(target=lambda: answers.append(server.post(path, body)))
    with server.client() as client:
        client.get("/health/live")
        sender.start()
        longest, start = 0.0, time.monotonic()
        while sender.is_alive():
            begun = time.monotonic()
            assert client.get("/health/live").status_code == 200
            longest = max(longest, time.monotonic() - begun)
            time.sleep(0.005)
    assert answers[0].status_code == 200, answers[0].text
    # In the event loop, it would be all of the time.
    assert longest < max(0.3, (time.monotonic() - start) / 3)
