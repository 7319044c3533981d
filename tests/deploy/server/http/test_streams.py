"""Streams: headers, real statuses, clients that do not read, long pictures, ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest

from deploy.server.requests import (
    CHAT,
    COMPLETIONS,
    IMAGES,
    LEAK,
    RESPONSES,
    chat,
    check_error,
    events_of,
    picture,
    reply_of,
    rgb_of,
)
from deploy.server.scripted_engine import LARGE, Script
from deploy.server.server_process import (
    SCRIPTED_ENGINE,
    ServerProcess,
    request_bytes,
    wait_until,
)

TOOL = [{"type": "image_generation"}]


@pytest.fixture(scope="module")
def alone(bundle: Path) -> Iterator[ServerProcess]:
    """A server with short times whose engine may die."""
    options = ("--slow-client", 1, "--keep-alive", 0.6, "--queue", 2, "--image-minutes", 0.1)
    client = "mmi_deploy.server.engine.client"
    constants = {f"{client}.BACK_OFF": [0.3], f"{client}.WINDOW": 0.0}
    with ServerProcess(bundle, *options, constants=constants, engine=SCRIPTED_ENGINE) as started:
        yield started


def body_of(path: str, script: Script, **fields: Any) -> dict[str, Any]:
    if path == CHAT:
        return chat(seed=script, stream=True, **fields)
    body: dict[str, Any] = {"model": "tiny", "stream": True, **fields}
    if path == COMPLETIONS:
        return {**body, "prompt": "the", "seed": script}
    if path == IMAGES:
        return {**body, "prompt": "the", "mmi": {"seed": script}}
    return {**body, "input": "the", "tools": TOOL, "mmi": {"seed": script, "max_images": 4}}


def wait_ready(server: ServerProcess) -> None:
    wait_until(lambda: server.get("/health/ready").status_code == 200)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, IMAGES])
def test_headers_of_a_stream(scripted: ServerProcess, path: str) -> None:
    script = Script.LARGE_PICTURE if path == IMAGES else Script.ANSWER
    headers = {"accept-encoding": "gzip, br, deflate", "x-request-id": "my-own_id-1"}
    response = scripted.post(path, body_of(path, script), headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in response.headers
    assert response.headers["x-request-id"] == "my-own_id-1"
    lines = response.text.split("\n")
    assert not any(line.startswith(("id:", "retry:", ":")) for line in lines)
    named = any(line.startswith("event:") for line in lines)
    assert named == (path in (RESPONSES, IMAGES))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, IMAGES])
def test_an_engine_that_dies_before_the_first_event_is_a_503(
    alone: ServerProcess, path: str
) -> None:
    for stream in (True, False):
        wait_ready(alone)
        response = alone.post(path, {**body_of(path, Script.DIE), "stream": stream})
        assert check_error(response, 503)["code"] == "engine_died"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_an_engine_that_dies_later_is_an_error_event(alone: ServerProcess, path: str) -> None:
    wait_ready(alone)
    response = alone.post(path, body_of(path, Script.DIE_LATER))
    assert response.status_code == 200
    last = list(events_of(response.text.split("\n")))[-1]
    error = last["response"]["error"] if path == RESPONSES else last["error"]
    assert error["code"] == ("server_error" if path == RESPONSES else "engine_died")
    assert "[DONE]" not in response.text
    # Not streamed, nothing has been sent yet.
    wait_ready(alone)
    response = alone.post(path, {**body_of(path, Script.DIE_LATER), "stream": False})
    assert check_error(response, 503)["code"] == "engine_died"


def test_a_fault_of_the_engine_shows_nothing_of_its_insides(scripted: ServerProcess) -> None:
    for path in (CHAT, COMPLETIONS, RESPONSES):
        for stream in (True, False):
            response = scripted.post(path, {**body_of(path, Script.FAIL), "stream": stream})
            error = check_error(response, 500)
            assert "secret" not in response.text and error["code"] == "engine_failed"


def test_a_bad_picture_is_a_400_also_of_a_stream(scripted: ServerProcess) -> None:
    body = chat(stream=True)
    url = {"url": "data:image/png;base64,AAAA"}
    body["messages"] = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    assert check_error(scripted.post(CHAT, body), 400)["code"] == "invalid_image"


def test_silence_is_broken_by_keep_alives_that_carry_nothing(alone: ServerProcess) -> None:
    wait_ready(alone)
    for path, sign in ((CHAT, '"choices":[]'), (COMPLETIONS, '"choices":[]'), (RESPONSES, ":")):
        lines: list[str] = []
        with alone.client() as client:
            with client.stream("POST", path, json=body_of(path, Script.HANG)) as response:
                assert response.status_code == 200
                for line in response.iter_lines():
                    lines += [line] if line else []
                    if len(lines) == 2:
                        break
        assert all(sign in line for line in lines), lines
    wait_until(lambda: not alone.get("/health").json()["documents"])


def test_a_failure_after_keep_alives_is_an_event(alone: ServerProcess) -> None:
    wait_ready(alone)
    lines: list[str] = []
    with alone.client() as client:
        with client.stream("POST", CHAT, json=body_of(CHAT, Script.HANG)) as response:
            for line in response.iter_lines():
                lines += [line] if line else []
                if line and len(lines) == 1:
                    os.kill(alone.engines[0], signal.SIGKILL)
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_died"


@pytest.mark.timing
def test_a_client_that_does_not_read_is_dropped_and_the_others_are_not_slowed(
    alone: ServerProcess,
) -> None:
    wait_ready(alone)
    before = alone.memory()
    body = json.dumps(body_of(CHAT, Script.FLOOD)).encode()
    with alone.connect() as sock:
        sock.sendall(request_bytes(CHAT, body, "X-Request-Id: slow-client"))
        begun = time.monotonic()
        assert alone.post(CHAT, chat(seed=Script.ANSWER)).status_code == 200
        assert time.monotonic() - begun < 3
        line = alone.logged("slow-client")
        assert line["reason"] == "cancelled"
        assert alone.metrics()['mmi_cancelled_total{where="slow_client"}'] >= 1
    wait_until(lambda: not alone.get("/health").json()["documents"])
    assert alone.memory() - before < 128 * 2**20  # all 40 pictures would be 200


def test_an_answer_that_nobody_reads_is_dropped_too(alone: ServerProcess) -> None:
    """Its document has ended, only the connection is left."""
    wait_ready(alone)
    body = json.dumps({**body_of(CHAT, Script.FLOOD), "stream": False}).encode()
    with alone.connect() as sock:
        sock.sendall(request_bytes(CHAT, body, "X-Request-Id: no-reader"))
        alone.logged("no-reader")
        assert connections(alone) >= 1
        wait_until(lambda: not connections(alone), 10)


def connections(server: ServerProcess) -> int:
    """Open connections to the server."""
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return sum(one.status == "ESTABLISHED" for one in found)


def test_texts_that_pile_up_are_joined(scripted: ServerProcess) -> None:
    response = scripted.post(CHAT, body_of(CHAT, Script.TEXTS))
    text, _ = reply_of(list(events_of(response.text.split("\n"))))
    assert text == " word" * 20_000


@pytest.mark.parametrize("transport", ["chunked", "url", "inline"])
def test_a_picture_of_a_megabyte_passes_readers_of_lines(
    scripted: ServerProcess, transport: str
) -> None:
    """aiohttp's reader of lines takes 64 KiB at most."""
    body = body_of(CHAT, Script.LARGE_PICTURE, mmi={"image_transport": transport})

    async def lines() -> list[bytes]:
        async with aiohttp.ClientSession() as session:
            async with session.post(scripted.address + CHAT, json=body) as response:
                return [line async for line in response.content]

    if transport == "inline":  # as the documentation says
        with pytest.raises(Exception, match="too big|more than"):
            asyncio.run(lines())
        return
    found = asyncio.run(lines())
    assert max(map(len, found)) <= 65_536
    events = list(events_of(line.decode().rstrip("\n") for line in found))
    if transport == "chunked":
        _, [rgb] = reply_of(events)
    else:
        [url] = [
            image["image_url"]["url"]
            for event in events
            for choice in event["choices"]
            for image in choice["delta"].get("images", ())
        ]
        kept = scripted.get(url)
        assert kept.headers["content-type"] == "image/png"
        assert kept.headers["x-content-type-options"] == "nosniff"
        assert len(kept.content) > 1_400_000
        rgb = rgb_of(kept.content)
    np.testing.assert_array_equal(rgb, picture(0, LARGE))


def test_a_kept_picture_goes_after_its_time(alone: ServerProcess) -> None:
    wait_ready(alone)
    body = chat(seed=Script.LARGE_PICTURE, mmi={"image_transport": "url"})
    reply = alone.post(CHAT, body).json()
    url = reply["choices"][0]["message"]["images"][0]["image_url"]["url"]
    assert alone.get(url).status_code == 200
    wait_until(lambda: alone.get(url).status_code == 404, 8, every=0.5)
    assert check_error(alone.get(url), 404)["code"] == "image_not_found"


def test_documents_that_hang_end_at_their_time(bundle: Path, server: ServerProcess) -> None:
    body = chat(images=40, tokens=400, mmi={"turn_tokens": 1, "max_seconds": 0.5})
    assert check_error(server.post(CHAT, body), 504)["code"] == "deadline"
    response = server.post(CHAT, {**body, "stream": True})
    if response.status_code == 200:
        last = list(events_of(response.text.split("\n")))[-1]
        assert last["error"]["code"] == "deadline"
        assert not LEAK.search(last["error"]["message"])
    else:
        check_error(response, 504)
