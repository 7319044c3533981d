"""Streams of chat completions: their bytes, the readers of clients, transports, failures."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.streams import StreamReader
from openai.types.chat import ChatCompletionChunk

from deploy.server.api.served import (
    LIMITS,
    Surroundings,
    each,
    file_of,
    items_of,
    pixels_of,
    random_picture,
    streamed,
    tiny,
    told,
)
from deploy.server.api.stream_readers import LINE, lines, sglang, vllm
from mmi_deploy.batching.job import JobStats
from mmi_deploy.errors import BusyError, EngineError
from mmi_deploy.runtime.events import Event, Finished, ImageDone, TextDelta
from mmi_deploy.runtime.sampling import Sampled
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.server.api import chat, completions
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.errors import ApiError

TEXT = ["the red ", "squäre 😀", " turns\u2028blue", "\x85.\r\n\n"]


def read(**more: Any) -> ApiRequest:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "the red square"}],
        "stream": True,
        "seed": 7,
        **more,
    }
    return chat.read(body, tiny(), LIMITS)


def usage(**more: Any) -> ApiRequest:
    return read(stream_options={"include_usage": True}, **more)


def chunks_of(data: bytes) -> list[dict[str, Any]]:
    """Chunks of a whole stream, each valid for the official client."""
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
        assert chunk["object"] == "chat.completion.chunk" and chunk["id"] == "chatcmpl-abc"
        assert "error" not in chunk
    return chunks


def split_twice(data: bytes) -> Iterator[list[bytes]]:
    """The stream cut at every place, and byte by byte."""
    for place in range(len(data) + 1):
        yield [data[:place], data[place:]]
    yield [data[place : place + 1] for place in range(len(data))]


def mixed(**options: Any) -> list[Event]:
    return told([random_picture(1, 8, 8), *TEXT, random_picture(2, 8, 8)], "max_images", **options)


def test_one_item_is_one_event_of_one_line_in_ascii() -> None:
    for request in (read(), usage(mmi={"progress": True, "partial_images": 1})):
        events = mixed(previews={2: random_picture(3, 8, 8)})
        for item in items_of(chat, request, events, Surroundings().context):
            assert re.fullmatch(rb"data: [\x20-\x7e]+\n\n", item)


def test_the_sequence_of_a_stream() -> None:
    chunks = chunks_of(streamed(chat, usage(), mixed(), Surroundings().context))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0]["role"] == "assistant" and deltas[0]["images"][0]["index"] == 0
    assert all("role" not in delta for delta in deltas[1:])
    assert [delta.get("content") for delta in deltas[1:5]] == TEXT
    last = deltas[5]["images"][0]
    assert last["index"] == 1 and last["mmi"]["offset"] == len("".join(TEXT))
    assert np.array_equal(pixels_of(last["image_url"]["url"]), random_picture(2, 8, 8))
    assert deltas[6] == {} and len(chunks) == 8
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert finishes == [None] * 6 + ["stop"]
    assert chunks[6]["mmi"]["reason"] == "max_images" and chunks[6]["mmi"]["seed"] == 7
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 4 + 34,
        "total_tokens": 42,
        "prompt_tokens_details": {"cached_tokens": 0, "text_tokens": 4, "image_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "text_tokens": 4,
            "image_tokens": 34,
        },
    }


def test_every_chunk_with_a_choice_carries_text_a_picture_or_the_end() -> None:
    request = read(mmi={"progress": True, "image_transport": "chunked"})
    data = streamed(chat, request, mixed(), Surroundings(event_bytes=900).context)
    for chunk in chunks_of(data):
        for choice in chunk["choices"]:
            delta = choice["delta"]
            assert delta.get("content") or delta.get("images") or choice["finish_reason"]


def test_a_reply_of_nothing_ends_with_its_role() -> None:
    (chunk,) = chunks_of(streamed(chat, read(), told([]), Surroundings().context))
    assert chunk["choices"][0]["delta"] == {"role": "assistant"}
    assert chunk["choices"][0]["finish_reason"] == "stop"


def test_without_usage_there_is_none() -> None:
    data = streamed(chat, read(), mixed(), Surroundings().context)
    assert b"usage" not in data and all(chunk["choices"] for chunk in chunks_of(data))


def test_usage_grows_with_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    request = read(stream_options=options, mmi={"progress": True})
    chunks = chunks_of(streamed(chat, request, mixed(), Surroundings().context))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 38
    shown = [c["usage"]["completion_tokens"] for c in chunks if c["choices"]]
    assert shown == [17, 18, 19, 20, 21, 38, 38]


def test_progress_is_told_on_request_without_choices() -> None:
    preview = random_picture(9, 8, 8)
    request = read(mmi={"progress": True, "partial_images": 1})
    events = told(["a", random_picture(1), random_picture(2)], given=5, previews={2: preview})
    chunks = chunks_of(streamed(chat, request, events, Surroundings().context))
    news = [chunk["mmi"] for chunk in chunks if not chunk["choices"]]
    for index in (0, 1):
        mine = [one for one in news if one["index"] == index]
        assert [(one["type"], one["step"], one["steps"]) for one in mine] == [
            ("image.started", 0, 3),
            ("image.progress", 1, 3),
            ("image.progress", 2, 3),
            ("image.partial", 2, 3),
            ("image.progress", 3, 3),
        ]
        url = "data:image/png;base64," + mine[3]["b64"]
        assert np.array_equal(pixels_of(url), preview)
    quiet = streamed(chat, read(), events, Surroundings().context)
    assert all(chunk["choices"] for chunk in chunks_of(quiet))


@pytest.mark.parametrize("transport", ["chunked", "url"])
def test_a_preview_never_makes_a_line_too_long(transport: str) -> None:
    mmi = {"progress": True, "partial_images": 1, "image_transport": transport}
    events = told([random_picture(1, 8, 8)], previews={2: random_picture(9, 300, 300)})
    data = streamed(chat, read(mmi=mmi), events, Surroundings().context)
    assert b"image.partial" not in data and max(map(len, data.split(b"\n"))) < LINE
    inline = streamed(
        chat, read(mmi={**mmi, "image_transport": "inline"}), events, Surroundings().context
    )
    assert b"image.partial" in inline


def test_log_probabilities_come_with_their_text() -> None:
    sampled = (Sampled(16, -0.25), Sampled(6, -0.5))
    events = [TextDelta("the .", sampled, 2), Finished("end", 2, 0, Timings())]
    chunks = chunks_of(streamed(chat, read(logprobs=True), events, Surroundings().context))
    content = chunks[0]["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in content] == [-0.25, -0.5]
    assert chunks[1]["choices"][0]["logprobs"] is None


def test_statistics_are_asked_for_when_the_events_have_ended() -> None:
    """An engine tells them with the end of the events, after `Finished`."""
    known: list[JobStats] = []

    async def events() -> AsyncIterator[Event]:
        for event in told(["red"]):
            yield event
        known.append(JobStats(0.5, None, 2.0, 4, 3))

    def ask() -> JobStats | None:
        return known[0] if known else None

    async def read_all(module: Any, request: ApiRequest) -> bytes:
        context = replace(Surroundings().context, stats=ask)
        known.clear()
        return b"".join([item async for item in module.stream(request, events(), context)])

    text = {"model": "tiny", "prompt": "red", "stream": True}
    for module, request in (
        (chat, usage()),
        (completions, completions.read(text, tiny(), LIMITS)),
    ):
        data = asyncio.run(read_all(module, request))
        assert b'"queue_seconds":0.5,"first_seconds":null,"total_seconds":2.0' in data
    assert b'"cached_tokens":3,"text_tokens":4' in asyncio.run(read_all(chat, usage()))


# --- readers of clients -----------------------------------------------------------------------


def test_vllm_reads_the_stream_however_it_is_cut() -> None:
    data = streamed(chat, usage(), mixed(), Surroundings().context)
    for pieces in split_twice(data):
        heard = vllm(pieces)
        assert heard.text == "".join(TEXT) and heard.done
        assert heard.tokens == 7  # texts, pictures and the end; the role is no token of its own
        assert heard.usage is not None and heard.usage["completion_tokens"] == 38


def test_vllm_reads_keep_alives_and_progress_too() -> None:
    request = usage(mmi={"progress": True})
    context = Surroundings().context
    items = items_of(chat, request, mixed(), context)
    alive = chat.KEEP_ALIVE(request, context)
    data = alive + b"".join(item + alive for item in items)
    heard = vllm([data])
    assert heard.text == "".join(TEXT) and heard.tokens == 7
    assert heard.usage is not None and heard.usage["completion_tokens"] == 38
    assert json.loads(alive.removeprefix(b"data: "))["choices"] == []


def test_sglang_reads_the_stream_however_it_is_cut() -> None:
    data = streamed(chat, read(), mixed(), Surroundings().context)
    for pieces in split_twice(data):
        heard = sglang(pieces)
        assert heard.text == "".join(TEXT) and heard.tokens == 4 and heard.done


def test_lines_are_read_however_they_are_cut() -> None:
    data = streamed(chat, usage(), mixed(), Surroundings().context)
    expected = data.splitlines(keepends=True)
    for pieces in split_twice(data):
        assert [*lines(pieces)] == expected


class Endless(BaseProtocol):
    """A connection whose bytes have all arrived."""

    def pause_reading(self) -> None: ...

    def resume_reading(self, resume_parser: bool = True) -> None: ...


BIG = random_picture(5, 740, 680)  # 1.5 MB as PNG


@pytest.mark.parametrize("transport", ["chunked", "url"])
def test_a_picture_of_one_and_a_half_megabytes_passes_the_line_reader_of_aiohttp(
    transport: str,
) -> None:
    assert len(file_of(BIG)) > 1_500_000
    around = Surroundings()
    request = read(mmi={"image_transport": transport})
    data = streamed(chat, request, told(["a", BIG, "b"]), around.context)
    assert max(len(line) for line in lines([data])) <= LINE

    async def read_lines() -> list[bytes]:
        loop = asyncio.get_running_loop()
        reader = StreamReader(Endless(loop), LINE, loop=loop)
        reader.feed_data(data)
        reader.feed_eof()
        return [line async for line in reader]

    assert b"".join(asyncio.run(read_lines())) == data
    url = "".join(
        image["image_url"]["url"]
        for chunk in chunks_of(data)
        for choice in chunk["choices"]
        for image in choice["delta"].get("images", [])
    )
    if transport == "url":
        assert url == "/v1/mmi/images/0" and around.stored == [(file_of(BIG), "image/png")]
    else:
        assert np.array_equal(pixels_of(url), BIG)


def test_inline_needs_a_client_with_long_lines() -> None:
    data = streamed(chat, read(), told([BIG]), Surroundings().context)
    with pytest.raises(ValueError, match="Chunk too big"):
        [*lines([data])]


@pytest.mark.parametrize("event_bytes", [700, 1000, 4096, 65_536])
@pytest.mark.parametrize("continuous", [False, True])
def test_pieces_fill_lines_and_never_exceed_them(event_bytes: int, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    request = read(stream_options=options, mmi={"image_transport": "chunked"})
    if continuous:
        event_bytes += 400
    rgb = random_picture(6, 200, 200)
    around = Surroundings(event_bytes=event_bytes)
    items = items_of(chat, request, told([rgb, rgb]), around.context)
    lengths = [len(item) for item in items if b"images" in item]
    assert max(lengths) <= event_bytes and lengths[0] >= event_bytes - 2
    first = json.loads(items[0].removeprefix(b"data: "))["choices"][0]["delta"]["images"][0]
    second = json.loads(items[1].removeprefix(b"data: "))["choices"][0]["delta"]["images"][0]
    assert set(first) == {"index", "type", "image_url", "mmi"}
    assert set(second) == {"index", "image_url"} and set(second["image_url"]) == {"url"}


# --- the official client ------------------------------------------------------------------------


def client_of(data: bytes, seed: int = 0) -> openai.OpenAI:
    """The official client, strict, in front of a stream that arrives in pieces of any length."""
    rng = random.Random(seed)

    def pieces() -> Iterator[bytes]:
        begun = 0
        while begun < len(data):
            end = begun + rng.choice([1, 2, 3, 50, 5000])
            yield data[begun:end]
            begun = end

    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=pieces())

    return openai.OpenAI(
        api_key="none",
        base_url="http://server.test/v1",
        max_retries=0,
        http_client=httpx2.Client(transport=httpx2.MockTransport(answer)),
        _strict_response_validation=True,
    )


@pytest.mark.parametrize("transport", ["inline", "chunked", "url"])
def test_the_official_client_puts_texts_and_pictures_together(transport: str) -> None:
    mmi = {"image_transport": transport, "progress": True}
    around = Surroundings(event_bytes=800)
    data = streamed(chat, usage(mmi=mmi), mixed(), around.context)
    client = client_of(data)
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "red"}]}
    plain = [*client.chat.completions.create(stream=True, **asked)]
    text = "".join(c.choices[0].delta.content or "" for c in plain if c.choices)
    assert text == "".join(TEXT) and plain[-1].usage is not None
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "".join(TEXT) and message.role == "assistant"
    images: Any = message.model_extra
    urls = [image["image_url"]["url"] for image in images["images"]]
    if transport == "url":
        assert urls == ["/v1/mmi/images/0", "/v1/mmi/images/1"]
    else:
        for seed, url in zip((1, 2), urls, strict=True):
            assert np.array_equal(pixels_of(url), random_picture(seed, 8, 8))


def test_the_official_client_raises_what_goes_wrong_in_a_stream() -> None:
    events = [TextDelta("red"), EngineError("engine at 0x7f00deadbeef in /opt/secret failed")]
    data = streamed(chat, read(), events, Surroundings().context)
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "red"}]}
    with pytest.raises(openai.APIError, match="could not complete") as caught:
        for _ in client_of(data).chat.completions.create(stream=True, **asked):
            pass
    assert (caught.value.code, caught.value.type) == ("engine_failed", "server_error")
    assert b"0x7f" not in data and b"secret" not in data


# --- failures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineError("x"), 500, "engine_failed"),
        (BusyError("the queue is full"), 429, "queue_full"),
        (ApiError(503, "engine_died", "the engine ended"), 503, "engine_died"),
    ],
)
def test_an_error_is_the_last_event_once_there_was_another(
    error: Exception, status: int, code: str
) -> None:
    items = items_of(chat, read(), [TextDelta("red"), error], Surroundings().context)
    assert len(items) == 2
    body = json.loads(items[1].removeprefix(b"data: "))
    assert body["error"]["code"] == code and set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_an_error_before_the_first_event_is_raised() -> None:
    for error in (EngineError("x"), BusyError("full"), ApiError(503, "engine_died", "x")):
        with pytest.raises(type(error)):
            items_of(chat, read(), [error], Surroundings().context)
    with pytest.raises(ApiError) as caught:
        items_of(chat, read(), told([], "deadline"), Surroundings().context)
    assert (caught.value.status, caught.value.code) == (504, "deadline")


@pytest.mark.parametrize(
    ("events", "code"),
    [
        (told(["red"], "deadline"), "deadline"),
        (told(["red"], "cancelled"), "cancelled"),
        ([TextDelta("red")], "engine_died"),
    ],
)
def test_endings_that_are_errors(events: list[Event], code: str) -> None:
    items = items_of(chat, usage(), events, Surroundings().context)
    assert json.loads(items[-1].removeprefix(b"data: "))["error"]["code"] == code
    assert b"[DONE]" not in items[-1] and b'finish_reason":"' not in b"".join(items)


def test_a_fault_of_the_server_is_told_without_its_words_and_raised_to_be_logged() -> None:
    async def read_all(heard: list[bytes]) -> None:
        events = [TextDelta("red"), RuntimeError("secret")]
        async for item in chat.stream(read(), each(events), Surroundings().context):
            heard.append(item)

    heard: list[bytes] = []
    with pytest.raises(RuntimeError):
        asyncio.run(read_all(heard))
    assert json.loads(heard[1].removeprefix(b"data: "))["error"]["code"] == "internal_error"
    assert b"secret" not in b"".join(heard)


def test_a_client_that_leaves_ends_the_stream_at_once() -> None:
    ended: list[str] = []

    async def events() -> AsyncIterator[Event]:
        try:
            while True:
                yield ImageDone(0, random_picture(1))
        finally:
            ended.append("events")

    async def leave() -> None:
        source = events()
        stream: Any = chat.stream(read(), source, Surroundings().context)
        await anext(stream)
        await stream.aclose()
        await source.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert ended == ["events"]
