"""`/v1/images/generations` as the official client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, get_type_hints

import numpy as np
import openai
import pytest
from openai.types import image_generate_params as official

from deploy.server.api.openai_client import (
    STEPS,
    TEXT,
    Cut,
    Server,
    by_bytes,
    collect,
    decoded,
    drawn,
    finished,
    longest_line,
    messages_of,
    picture,
    run,
    whole,
)
from deploy.server.api.served import LIMITS, Surroundings, each, tiny
from mmi_deploy.documents.document import Draw, Text, document_of
from mmi_deploy.runtime.events import Event, ImageDone, ImageProgress, ImageStarted
from mmi_deploy.server.api import image_generations as images
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.settings import RequestLimits

MODEL = tiny()
PICTURE = 1 + MODEL.config.visual_tokens
PROMPT = 1 + len(MODEL.tokenizer.encode(TEXT))

Events = Iterable[Event | Exception]


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": TEXT, **more}


def read(**more: Any) -> images.ImagesRequest:
    return images.read(ask(**more), MODEL, LIMITS)


def one(index: int, previews: int = 0) -> list[Event]:
    """Events of the document of one picture."""
    return [*drawn(index, previews=previews), finished(0, 1, "max_tokens")]


def sources(made: Sequence[Events]) -> list[AsyncIterator[Event]]:
    return [each(events) for events in made]


def server(made: Sequence[Events], cut: Cut = whole) -> Server:
    def answer(body: dict[str, Any]) -> dict[str, Any] | list[bytes]:
        request = images.read(body, MODEL, LIMITS)
        assert len(request.requests) == len(made)
        context = Surroundings(cached=3).context
        if request.stream:
            return collect(images.stream(request, sources(made), context))
        return run(images.reply(request, sources(made), context))

    return Server(answer, cut)


def test_each_picture_is_a_document_with_the_next_seed() -> None:
    request = read(n=3, mmi={"seed": 2**64 - 2})
    assert request.document == document_of(Text(TEXT), Draw())
    assert [single.options.seed for single in request.requests] == [2**64 - 2, 2**64 - 1, 0]
    for single in request.requests:
        assert single.document == request.document and len(single.requests) == 1
        assert (single.options.max_tokens, single.options.max_images) == (0, 0)


def test_reply_has_pictures_in_the_order_of_their_seeds() -> None:
    made = [one(0), one(1), one(2)]
    asked = {**ask(n=3), "extra_body": {"mmi": {"seed": 7}}}
    reply = server(made).client().images.generate(**asked)
    assert reply.data is not None and len(reply.data) == 3
    for number, single in enumerate(reply.data):
        assert np.array_equal(decoded(single.b64_json or ""), picture(number))
        mmi = single.model_dump()["mmi"]
        assert (mmi["index"], mmi["seed"]) == (number, 7 + number)
    assert (reply.size, reply.output_format, reply.background) == ("64x64", "png", "opaque")
    assert reply.usage is not None
    assert reply.usage.model_dump() == {
        "input_tokens": 3 * PROMPT,
        "input_tokens_details": {"text_tokens": 3 * PROMPT, "image_tokens": 0},
        "output_tokens": 3 * PICTURE,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 3 * PICTURE},
        "total_tokens": 3 * (PROMPT + PICTURE),
    }


def test_one_picture_tells_its_time_in_the_queue() -> None:
    reply = server([one(0)]).client().images.generate(**ask())
    assert reply.data is not None and reply.data[0].model_dump()["mmi"]["queue_seconds"] == 0.25


@pytest.mark.parametrize("cut", [whole, by_bytes])
def test_stream_has_previews_and_the_picture(cut: Cut) -> None:
    made = server([one(0, previews=2)], cut)
    events = list(made.client().images.generate(**ask(partial_images=2), stream=True))
    *partials, last = events
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 2
    for number, event in enumerate(partials):
        assert event.type == "image_generation.partial_image"
        assert event.partial_image_index == number and event.size == "8x8"
        assert np.array_equal(decoded(event.b64_json), picture(number + 1, 8))
    assert last.type == "image_generation.completed"
    assert np.array_equal(decoded(last.b64_json), picture(0))
    assert (last.usage.input_tokens, last.usage.output_tokens) == (PROMPT, PICTURE)


def test_async_client_reads_replies_and_streams() -> None:
    async def use() -> None:
        client = server([one(0), one(1)]).async_client()
        reply = await client.images.generate(**ask(n=2))
        assert reply.data is not None and len(reply.data) == 2
        events = [event async for event in await client.images.generate(**ask(n=2), stream=True)]
        assert len(events) == 2

    asyncio.run(use())


def test_stream_of_several_pictures_numbers_them_as_they_come() -> None:
    release = asyncio.Event()

    async def late() -> AsyncIterator[Event]:
        await release.wait()
        for event in one(0, previews=1):
            yield event

    async def early() -> AsyncIterator[Event]:
        for event in one(1, previews=1):
            yield event
        release.set()

    request = read(n=2, stream=True, partial_images=1)
    items = collect(images.stream(request, [late(), early()], Surroundings().context))
    found = [(value["mmi"]["index"], value["type"]) for value in messages_of(items)]
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert found == [(1, partial), (1, completed), (0, partial), (0, completed)]


def test_url_keeps_the_picture_and_sends_short_lines() -> None:
    around = Surroundings(event_bytes=4096)
    big = ImageProgress(0, 1, STEPS, picture(5))
    made = [ImageStarted(0, STEPS), big, ImageDone(0, picture(0)), finished(0, 1)]
    request = read(stream=True, response_format="url", partial_images=1)
    items = collect(images.stream(request, sources([made]), around.context))
    partial, completed = messages_of(items)
    assert longest_line(items) <= 4096
    side = decoded(partial["b64_json"]).shape[0]
    assert partial["size"] == f"{side}x{side}" and 8 <= side < 64
    assert (completed["b64_json"], completed["url"]) == ("", "/v1/mmi/images/0")
    assert [mime for _, mime in around.stored] == ["image/png"]
    reply = server([one(0)]).client().images.generate(**ask(response_format="url"))
    assert reply.data is not None and reply.data[0].url == "/v1/mmi/images/0"
    assert read(mmi={"image_transport": "url"}).transport == "url"


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
def test_output_format_is_that_of_reply_and_stream(form: Any) -> None:
    client = server([one(0)]).client()
    quality = {} if form == "png" else {"output_compression": 50}
    reply = client.images.generate(**ask(output_format=form, **quality))
    (event,) = client.images.generate(**ask(output_format=form), stream=True)
    assert reply.output_format == form and event.output_format == form
    assert read(output_format=form, **quality).output_compression == quality.get(
        "output_compression"
    )


DIED = ApiError(503, "engine_died", "the engine process ended")


@pytest.mark.parametrize("end", [DIED, finished(0, 0, "deadline"), None])
def test_failure_of_one_picture_ends_the_stream_and_leaves_no_task(end: Any) -> None:
    closed = []

    async def waiting() -> AsyncIterator[Event]:
        try:
            yield ImageProgress(0, 1, STEPS, picture(1, 8))
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    failing = [*drawn(1, previews=1)[:3], *([] if end is None else [end])]
    request = read(n=2, stream=True, partial_images=1)
    items: list[bytes] = []

    async def use() -> None:
        context = Surroundings().context
        async with asyncio.timeout(20):
            async for item in images.stream(request, [waiting(), each(failing)], context):
                items.append(item)
        assert closed == [True] and len(asyncio.all_tasks()) == 1

    asyncio.run(use())
    with pytest.raises(openai.APIError) as caught:
        list(Server(lambda _: items).client().images.generate(**ask(n=2), stream=True))
    assert caught.value.message


def test_client_that_leaves_ends_the_readers_of_events() -> None:
    closed = []

    async def waiting() -> AsyncIterator[Event]:
        try:
            yield ImageProgress(0, 1, STEPS, picture(1, 8))
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def use() -> None:
        request = read(n=2, stream=True, partial_images=1)
        stream = images.stream(request, [waiting(), waiting()], Surroundings().context)
        async with asyncio.timeout(20):
            await anext(stream)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
        assert closed == [True, True] and len(asyncio.all_tasks()) == 1

    asyncio.run(use())


def test_failure_before_the_first_event_is_raised() -> None:
    for stream in (False, True):
        request = read(stream=stream)
        with pytest.raises(ApiError) as caught:
            if stream:
                collect(images.stream(request, sources([[DIED]]), Surroundings().context))
            else:
                run(images.reply(request, sources([[DIED]]), Surroundings().context))
        assert caught.value.code == "engine_died"
    # Where a keep-alive went out before it, the client is told in the stream.
    context = Surroundings().context
    items = [images.KEEP_ALIVE(request, context), images.failure(request, DIED, context)]
    with pytest.raises(openai.APIError):
        list(Server(lambda _: items).client().images.generate(**ask(), stream=True))


@pytest.mark.parametrize(
    "more",
    [
        {"size": "auto"},
        {"size": "64x64"},
        {"n": 1},
        {"quality": "auto"},
        {"quality": "standard"},
        {"background": "opaque"},
        {"moderation": "low"},
        {"response_format": "b64_json"},
        {"output_format": "png"},
        {"style": None, "user": "me"},
        {"partial_images": 2},
    ],
    ids=str,
)
def test_neutral_values_change_nothing(more: dict[str, Any]) -> None:
    assert read(mmi={"seed": 7}, **more) == read(mmi={"seed": 7})


def test_options_of_drawing_are_those_of_the_request() -> None:
    extensions = {"seed": 7, "guidance": 2.0, "schedule": "ddim:8", "full_every": 2}
    request = read(mmi={**extensions, "max_seconds": 5}, stream=True, partial_images=3)
    options = request.options
    assert (options.seed, options.guidance, options.schedule) == (7, 2.0, "ddim:8")
    assert (options.full_every, options.previews, request.max_seconds) == (2, 3, 5)


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"model": "dall-e-3"}, "model", "model_not_found"),
        ({"prompt": None}, "prompt", "invalid_type"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 1000}, "n", "too_many_images"),
        ({"size": "1024x1024"}, "size", "unsupported_value"),
        ({"quality": "hd"}, "quality", "unsupported_value"),
        ({"style": "vivid"}, "style", "unsupported_value"),
        ({"background": "transparent"}, "background", "unsupported_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 50}, "output_compression", "conflicting_values"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"partial_images": 4}, "partial_images", "invalid_value"),
        (
            {"response_format": "url", "mmi": {"image_transport": "inline"}},
            "response_format",
            "conflicting_values",
        ),
        ({"mmi": {"image_transport": "chunked"}}, "mmi.image_transport", "unsupported_value"),
        ({"mmi": {"max_images": 2}}, "mmi.max_images", "unsupported_value"),
        ({"mmi": {"turn_tokens": 2}}, "mmi.turn_tokens", "unsupported_value"),
        ({"image": "a"}, "image", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refusals_name_the_field(more: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(**more)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_number_of_pictures_has_the_limit_of_the_server() -> None:
    limits = RequestLimits(images=2)
    assert images.read(ask(n=2), MODEL, limits).pictures == 2
    with pytest.raises(ApiError, match="at most 2"):
        images.read(ask(n=3), MODEL, limits)


def test_every_field_of_the_official_client_is_known() -> None:
    names = set(get_type_hints(official.ImageGenerateParamsStreaming))
    assert "prompt" in names and names <= set(images.ImagesBody.model_fields)


def test_examples_of_the_schema_are_read() -> None:
    for example in images.REQUEST_SCHEMA["examples"]:
        assert images.read(example, MODEL, LIMITS).pictures
    assert images.REQUEST_SCHEMA["required"] == ["prompt"]
