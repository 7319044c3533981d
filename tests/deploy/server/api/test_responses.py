"""`/v1/responses` as the official client sees it, and every rule of its requests."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import pytest
from openai.types.responses import Response
from openai.types.responses import response_create_params as official
from openai.types.responses.response_failed_event import ResponseFailedEvent
from openai.types.responses.tool_param import ImageGeneration
from PIL import Image as Pillow

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
    picture_url,
    run,
    text,
    whole,
)
from deploy.server.api.served import LIMITS, Surroundings, each, tiny
from mmi_deploy.documents.document import (
    Document,
    Draw,
    Image,
    Part,
    Text,
    document_of,
    encode_document,
)
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.events import Event, ImageDone, ImageProgress, ImageStarted, TextDelta
from mmi_deploy.runtime.generation import Generation, drive
from mmi_deploy.runtime.options import DEFAULTS
from mmi_deploy.runtime.runtime import Runtime
from mmi_deploy.runtime.session import Session
from mmi_deploy.server.api import responses
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.reply_context import ReplyContext
from mmi_deploy.server.api.responses_events import ResponsesRequest
from mmi_deploy.server.settings import RequestLimits

if TYPE_CHECKING:
    from exports import Exported

MODEL = tiny()
TOOL = {"type": "image_generation"}

# Text, a picture, text, a picture, text: what a document without places to draw becomes.
STORY: list[Event] = [
    *text("the red", " square"),
    *drawn(0, previews=2),
    *text("a ring", before=2),
    *drawn(1, previews=2),
    *text("moves", " left", before=3),
    finished(5, 2),
]


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "input": TEXT, "tools": [TOOL], **more}


def read(**more: Any) -> ResponsesRequest:
    return responses.read(ask(**more), MODEL, LIMITS)


def context(event_bytes: int = 65_536) -> ReplyContext:
    return Surroundings(cached=3, event_bytes=event_bytes).context


def server(
    events: Iterable[Event | Exception], cut: Cut = whole, event_bytes: int = 65_536
) -> Server:
    """A server whose engine makes `events` of every request."""
    made = list(events)

    def answer(body: dict[str, Any]) -> dict[str, Any] | list[bytes]:
        request = responses.read(body, MODEL, LIMITS)
        around = context(event_bytes)
        if request.stream:
            return collect(responses.stream(request, each(made), around))
        return run(responses.reply(request, each(made), around))

    return Server(answer, cut)


def ids(document: Document) -> list[int]:
    return encode_document(document, MODEL.tokenizer, MODEL.config).token_ids.tolist()


def same(document: Document, parts: list[Part]) -> bool:
    """Equality of documents, pixels included."""
    wanted = document_of(*parts)
    pairs = list(zip(document.parts, wanted.parts, strict=False))
    return len(document.parts) == len(wanted.parts) and all(
        np.array_equal(one.rgb, other.rgb)
        if isinstance(one, Image) and isinstance(other, Image)
        else one == other
        for one, other in pairs
    )


def check_story(response: Response) -> None:
    """Items are what the events of `STORY` made, in their order, pixels to the bit."""
    kinds = ["message", "image_generation_call", "message", "image_generation_call", "message"]
    assert [item.type for item in response.output] == kinds
    texts = [item.content[0].text for item in response.output if item.type == "message"]
    assert texts == ["the red square", "a ring", "moves left"]
    calls = [item for item in response.output if item.type == "image_generation_call"]
    for number, call in enumerate(calls):
        assert call.status == "completed" and call.size == "64x64"
        assert np.array_equal(decoded(call.result or ""), picture(number))
    assert response.status == "completed" and response.store is False
    assert len({item.id for item in response.output}) == len(kinds)


def test_reply_holds_text_and_pictures_in_order_and_is_valid() -> None:
    response = server(STORY).client().responses.create(**ask())
    check_story(response)
    assert response.output_text == "the red squarea ringmoves left"
    mmi = response.model_dump()["mmi"]
    assert mmi["reason"] == "end" and mmi["seed"] >= 0
    assert mmi["queue_seconds"] == 0.25 and mmi["stage_seconds"]["prefill"] == 0.25


def test_async_client_reads_replies_streams_and_the_helper() -> None:
    async def use() -> None:
        client = server(STORY, by_bytes).async_client()
        check_story(await client.responses.create(**ask()))
        async for event in await client.responses.create(**ask(), stream=True):
            last = event
        assert last.type == "response.completed"
        check_story(last.response)
        async with client.responses.stream(**ask()) as helper:
            async for _ in helper:
                pass
            check_story(await helper.get_final_response())

    asyncio.run(use())


@pytest.mark.parametrize("cut", [whole, by_bytes])
def test_stream_helper_rebuilds_the_reply(cut: Cut) -> None:
    with server(STORY, cut).client().responses.stream(**ask()) as helper:
        deltas = [event.delta for event in helper if event.type == "response.output_text.delta"]
        check_story(helper.get_final_response())
    assert deltas == ["the red", " square", "a ring", "moves", " left"]


def test_stream_cut_anywhere_is_the_same_stream() -> None:
    events = [*text("a", " ring"), finished(2, 0)]
    made = collect(responses.stream(read(stream=True), each(events), context()))
    length = len(b"".join(made))
    for place in range(1, length, 37):
        client = server(events, lambda data, at=place: [data[:at], data[at:]]).client()
        kinds = [event.type for event in client.responses.create(**ask(), stream=True)]
        assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
        assert len(kinds) == len(made)


def test_stream_has_the_sequence_of_the_specification() -> None:
    events = [*text("red"), *drawn(0, previews=1), finished(1, 1)]
    request = read(stream=True, tools=[{**TOOL, "partial_images": 1}])
    assert request.options.previews == 1
    items = collect(responses.stream(request, each(events), context()))
    found = messages_of(items)
    assert len(items) == len(found)  # one event an item
    call = "image_generation_call"
    kinds = [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", f"{call}.in_progress", f"{call}.generating"),
        *(f"{call}.partial_image", *[f"{call}.generating"] * (STEPS - 1), f"{call}.completed"),
        *("output_item.done", "completed"),
    ]
    assert [one["type"] for one in found] == [f"response.{kind}" for kind in kinds]
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    steps = [one["mmi"] for one in found if one["type"].endswith("generating")]
    assert steps == [{"step": step, "steps": STEPS} for step in range(1, STEPS + 1)]
    assert [one["output_index"] for one in found[2:-1]] == [0] * 6 + [1] * (len(found) - 9)


def test_partial_images_are_numbered_for_each_picture() -> None:
    tools = [{**TOOL, "partial_images": 2}]
    stream = server(STORY).client().responses.create(**ask(tools=tools), stream=True)
    kind = "response.image_generation_call.partial_image"
    partials = [event for event in stream if event.type == kind]
    assert [event.partial_image_index for event in partials] == [0, 1, 0, 1]
    assert [event.size for event in partials] == ["8x8"] * 4
    for event, seed in zip(partials, (1, 2, 101, 102), strict=True):
        assert np.array_equal(decoded(event.partial_image_b64), picture(seed, 8))


def test_usage_is_what_the_document_says() -> None:
    scene = {"type": "input_image", "image_url": picture_url(9), "detail": "auto"}
    body = ask(input=[{"role": "user", "content": [scene, {"type": "input_text", "text": TEXT}]}])
    one_picture = 1 + MODEL.config.visual_tokens
    text_tokens = 1 + len(MODEL.tokenizer.encode(TEXT))
    for stream in (False, True):
        client = server([*text("a", "b"), *drawn(1), finished(2, 1)]).client()
        got = client.responses.create(**body, stream=stream)
        usage = [*got][-1].response.usage if stream else got.usage
        assert usage.model_dump(exclude_none=True) == {
            "input_tokens": text_tokens + one_picture,
            "input_tokens_details": {
                "cached_tokens": 3,
                "cache_write_tokens": 0,
                "text_tokens": text_tokens,
                "image_tokens": one_picture,
            },
            "output_tokens": 2 + one_picture,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "text_tokens": 2,
                "image_tokens": one_picture,
            },
            "total_tokens": text_tokens + 2 + 2 * one_picture,
        }


def test_usage_so_far_is_in_every_event_where_it_is_asked_for() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    request = read(stream=True, stream_options=options)
    items = collect(responses.stream(request, each(STORY), context()))
    so_far = [one["mmi"]["usage"]["output_tokens"] for one in messages_of(items)]
    one_picture = 1 + MODEL.config.visual_tokens
    assert so_far == sorted(so_far) and so_far[0] == 0 and so_far[-1] == 5 + 2 * one_picture


# Feeding back


def test_output_as_the_next_input_is_the_document_that_the_model_had() -> None:
    scene = picture(9)
    first = [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": picture_url(9), "detail": "auto"},
                {"type": "input_text", "text": TEXT},
            ],
        }
    ]
    events = [
        *text("the red", " square"),
        *drawn(1),
        *text("a ring", before=2),
        finished(3, 1),
    ]
    client = server(events).client()
    with client.responses.stream(**ask(input=first)) as helper:
        helper.until_done()
        helped = helper.get_final_response()
    had: list[Part] = [
        *(Image(scene), Text(TEXT + "the red square"), Image(picture(1)), Text("a ring")),
    ]
    for reply in (client.responses.create(**ask(input=first)), helped):
        for output in (
            reply.model_dump()["output"],
            reply.model_dump(exclude_none=True)["output"],
            [item.to_dict() for item in reply.output],
        ):
            request = read(input=[*first, *output])
            assert same(request.document, had)
            assert ids(request.document) == ids(document_of(*had))


def test_pictures_of_places_in_the_input_return_to_them() -> None:
    draw, turn = {"type": "mmi.draw"}, {"role": "user"}
    one = {"type": "input_text", "text": "the red square"}
    two = {"type": "input_text", "text": "moves down."}
    first = [{**turn, "content": [one, draw, two, draw]}]
    request = read(input=first)
    assert request.document == document_of(
        Text("the red square"), Draw(), Text("moves down."), Draw()
    )
    assert request.places == {0: 0, 1: 1}
    reply = (
        server([*drawn(0), *drawn(1), *text("ring"), finished(1, 2)])
        .client()
        .responses.create(**ask(input=first))
    )
    assert [item.type for item in reply.output] == ["image_generation_call"] * 2 + ["message"]
    assert [item.mmi["place"] for item in reply.output[:2]] == [0, 1]

    # A second turn has one more place, and only that is drawn.
    second = [*first, *reply.model_dump()["output"], {**turn, "content": [draw]}]
    request = read(input=second)
    zero, after = Image(picture(0)), Image(picture(1))
    had: list[Part] = [Text("the red square"), zero, Text("moves down."), after, Text("ring")]
    assert same(request.document, [*had, Draw()])
    assert request.places == {2: 2}
    client = server([*drawn(2), finished(0, 1)]).client()
    third = client.responses.create(**ask(input=second))
    request = read(input=[*second, *third.model_dump()["output"]])
    assert same(request.document, [*had, Image(picture(2))]) and request.places == {}


def test_any_conversation_comes_back_as_the_document_that_the_model_had() -> None:
    """Turns of texts, pictures and places at random; replies go back as they were sent."""
    chance = random.Random(3)
    words = ["the", "red", "square", "moves", "down", "."]

    def phrase() -> str:
        return "".join(f" {chance.choice(words)}" for _ in range(chance.randrange(1, 4)))

    for _ in range(25):
        items: list[dict[str, Any]] = []
        had: list[Part] = []
        for _ in range(chance.randrange(1, 4)):
            content: list[dict[str, Any]] = []
            for _ in range(chance.randrange(1, 4)):
                seed = chance.randrange(4)
                written = phrase()
                kinds: list[tuple[dict[str, Any], Part]] = [
                    ({"type": "input_text", "text": written}, Text(written)),
                    (
                        {"type": "input_image", "image_url": picture_url(seed), "detail": "auto"},
                        Image(picture(seed)),
                    ),
                    ({"type": "mmi.draw"}, Draw()),
                ]
                part, meant = chance.choice(kinds)
                content.append(part)
                had.append(meant)
            items.append({"role": "user", "content": content})
            request = read(input=items)
            assert same(request.document, had)
            events: list[Event] = []
            # First the places that are open, as the engine draws them, then what it likes.
            for index, image in enumerate(request.document.images):
                if isinstance(image, Draw):
                    events += drawn(index)
                    had[had.index(Draw())] = Image(picture(index))
            count = len(request.document.images)
            for _ in range(chance.randrange(3)):
                if chance.random() < 0.5:
                    events += drawn(count)
                    had.append(Image(picture(count)))
                    count += 1
                else:
                    events += text(written := phrase())
                    had.append(Text(written))
            reply = server([*events, finished(1, 1)]).client().responses.create(**ask(input=items))
            items += reply.model_dump()["output"]
        request = read(input=items)
        assert same(request.document, had) and not request.places
        assert request.prompt_usage.total == len(ids(document_of(*had)))


@pytest.mark.slow
def test_reply_of_the_model_gives_its_token_ids_again(
    exported_once: Callable[[str], Exported],
) -> None:
    runtime = Runtime.open(exported_once("shipped").bundle.folder)
    for seed in range(3):
        scene = {"type": "input_image", "image_url": picture_url(seed), "detail": "auto"}
        content = [scene, {"type": "input_text", "text": TEXT}, {"type": "mmi.draw"}]
        asked = [{"role": "user", "content": content}]
        more = {"mmi": {"seed": seed, "max_images": 1}, "max_output_tokens": 16}
        request = read(input=asked, **more)
        session = Session(runtime)
        steps = runtime.schedule(None).schedule.steps
        generation = Generation(
            session.sequence,
            runtime.tokenizer,
            request.document,
            request.options,
            steps,
            session.timings,
        )
        events = list(drive(generation.run(), session.do))
        reply = server(events).client().responses.create(**ask(input=asked, **_as_sent(more)))
        again = read(input=[*asked, *reply.model_dump()["output"]])
        assert ids(again.document) == [*session.sequence.token_ids]
        assert reply.usage is not None
        assert reply.usage.total_tokens == len(session.sequence.token_ids)


def _as_sent(more: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the client, which has no name for ours."""
    return {
        **{key: one for key, one in more.items() if key != "mmi"},
        "extra_body": {"mmi": more["mmi"]},
    }


def test_place_that_is_not_open_is_refused() -> None:
    item = {"type": "image_generation_call", "result": picture_url(0)[22:], "id": "ig_1"}
    draw = {"role": "user", "content": [{"type": "mmi.draw"}]}
    for items in (
        [{**item, "mmi": {"place": 0}}],
        [{**item, "mmi": {"place": 0}}, draw],
        [draw, {**item, "mmi": {"place": 1}}],
        [draw, {**item, "mmi": {"place": 0}}, {**item, "mmi": {"place": 0}}],
    ):
        with pytest.raises(ApiError) as caught:
            read(input=items)
        assert str(caught.value.param).endswith(".mmi.place")


def test_unfinished_picture_is_left_out_and_an_empty_one_is_refused() -> None:
    item = {"type": "image_generation_call", "id": "ig_1", "status": "failed", "result": None}
    assert read(input=[{"role": "user", "content": TEXT}, item]).document == document_of(Text(TEXT))
    for result, status in (("", "completed"), (None, "completed"), (None, None)):
        with pytest.raises(ApiError) as caught:
            read(input=[{**item, "result": result, "status": status}])
        assert caught.value.param == "input[0].result"


def test_instructions_and_system_messages_come_first() -> None:
    items = [
        {"role": "user", "content": " ring"},
        {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "red"}]},
        {"role": "assistant", "content": " blue"},
    ]
    assert read(input=items, instructions="a ").document == document_of(Text("a red ring blue"))


def test_picture_by_url_comes_back_through_the_store() -> None:
    kept = Surroundings()

    def fetch(url: str) -> bytes:
        return kept.stored[int(url.removeprefix("/v1/mmi/images/"))][0]

    request = read(mmi={"image_transport": "url"})
    output = run(responses.reply(request, each(STORY), kept.context))["output"]
    body = ask(input=[{"role": "user", "content": TEXT}, *output])
    again = responses.read(body, MODEL, LIMITS, fetch)
    had = [Text(TEXT + "the red square"), Image(picture(0)), Text("a ring"), Image(picture(1))]
    assert same(again.document, [*had, Text("moves left")])
    with pytest.raises(ApiError) as caught:
        responses.read(body, MODEL, LIMITS)
    assert caught.value.code == "remote_images_off"


def test_whitespace_in_front_of_a_reply_is_stripped_as_it_was_for_the_model() -> None:
    first = [{"role": "user", "content": "the red \n"}]
    reply = server([*text(" square"), finished(1, 0)]).client().responses.create(**ask(input=first))
    assert read(input=first).document == document_of(Text("the red"))
    again = read(input=[*first, *reply.model_dump()["output"]])
    assert again.document == document_of(Text("the red square"))


def test_model_draws_no_more_than_the_document_has_room_for() -> None:
    limits = RequestLimits(images=3)
    content = [{"type": "mmi.draw"}] * 2
    body = ask(input=[{"role": "user", "content": content}])
    assert responses.read(body, MODEL, limits).options.max_images == 1


# Transports


def test_transport_url_keeps_pictures_and_sends_short_lines() -> None:
    around = Surroundings(event_bytes=4096)
    body = ask(stream=True, mmi={"image_transport": "url", "seed": 7}, user="x" * 4000)
    request = responses.read(body, MODEL, LIMITS)
    items = collect(responses.stream(request, each(STORY), around.context))
    assert longest_line(items) <= 4096
    found = messages_of(items)
    calls = [one for one in found[-1]["response"]["output"] if one["type"] != "message"]
    assert [call["result"] for call in calls] == ["", ""]
    urls = [f"/v1/mmi/images/{number}" for number in range(2)]
    assert [call["mmi"] for call in calls] == [
        {"seed": 7, "steps": STEPS, "url": url} for url in urls
    ]
    assert [mime for _, mime in around.stored] == ["image/png"] * 2
    client = server(STORY).client()
    reply = client.responses.create(**ask(), extra_body={"mmi": {"image_transport": "url"}})
    assert [one.mmi["url"] for one in reply.output if one.type != "message"] == urls


def test_transport_chunked_sends_pictures_in_events_that_strict_clients_know() -> None:
    body = {"extra_body": {"mmi": {"image_transport": "chunked"}}}
    made = server(STORY, event_bytes=4096)
    pieces: dict[str, list[str]] = {}
    results: dict[str, str] = {}
    for event in made.client().responses.create(**ask(), **body, stream=True):
        mmi = getattr(event, "mmi", None) or {}
        if event.type.endswith("generating") and "result" in mmi:
            assert mmi["offset"] == sum(map(len, pieces.get(event.item_id, [])))
            pieces.setdefault(event.item_id, []).append(mmi["result"])
        if event.type == "response.output_item.done" and event.item.type != "message":
            assert event.item.result == ""
            results[event.item.id] = "".join(pieces[event.item.id])
            assert len(results[event.item.id]) == event.item.mmi["result_length"]
    assert min(map(len, pieces.values())) > 1
    for number, result in enumerate(results.values()):
        assert np.array_equal(decoded(result), picture(number))
    with made.client().responses.stream(**ask(), **body) as helper:
        assert [item.type for item in helper.get_final_response().output][1::2] == [
            "image_generation_call"
        ] * 2
    request = responses.read(ask(stream=True, **body["extra_body"]), MODEL, LIMITS)
    around = context(4096)
    assert longest_line(collect(responses.stream(request, each(STORY), around))) <= 4096
    # One reply has no lines: it is whole.
    check_story(made.client().responses.create(**ask(), **body))


def test_previews_fit_the_line_and_say_their_size() -> None:
    big = ImageProgress(0, 1, STEPS, picture(3))
    body = ask(stream=True, mmi={"image_transport": "url"}, tools=[{**TOOL, "partial_images": 1}])
    request = responses.read(body, MODEL, LIMITS)
    around = context(4096)
    made = [ImageStarted(0, STEPS), big, ImageDone(0, picture(0)), finished(0, 1)]
    items = collect(responses.stream(request, each(made), around))
    (partial,) = [one for one in messages_of(items) if one["type"].endswith("partial_image")]
    assert longest_line(items) <= 4096
    side = decoded(partial["partial_image_b64"]).shape[0]
    assert partial["size"] == f"{side}x{side}" and 8 <= side < 64


@pytest.mark.parametrize(("form", "mime"), [("webp", "WEBP"), ("jpeg", "JPEG")])
def test_output_format_of_the_tool_is_that_of_the_file(form: str, mime: str) -> None:
    tools = [{**TOOL, "output_format": form, "output_compression": 40}]
    request = read(tools=tools)
    assert (request.output_format, request.output_compression) == (form, 40)
    reply = server([*drawn(0), finished(0, 1)]).client().responses.create(**ask(tools=tools))
    item = reply.output[0]
    assert item.output_format == form
    with Pillow.open(io.BytesIO(base64.b64decode(item.result or ""))) as file:
        assert file.format == mime


# Ends


@pytest.mark.parametrize("reason", ["max_tokens", "context"])
def test_reply_that_met_a_limit_is_incomplete(reason: Any) -> None:
    events = [*text("a", " ring"), finished(2, 0, reason)]
    client = server(events).client()
    reply = client.responses.create(**ask())
    *_, last = client.responses.create(**ask(), stream=True)
    assert last.type == "response.incomplete"
    for response in (reply, last.response):
        assert response.status == "incomplete" and response.completed_at is None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output[0].status == "incomplete"
        assert response.model_dump()["mmi"]["reason"] == reason
    with client.responses.stream(**ask()) as helper:
        assert [event.type for event in helper][-1] == "response.incomplete"


@pytest.mark.parametrize("reason", ["end", "stop", "max_images"])
def test_usual_ends_are_complete(reason: Any) -> None:
    reply = server([*text("a"), finished(1, 0, reason)]).client().responses.create(**ask())
    assert reply.status == "completed" and reply.incomplete_details is None
    assert reply.output[0].status == "completed"


DIED = ApiError(503, "engine_died", "the engine process ended")
DRAWING = [*text("a"), *drawn(0), *text(" ring"), *drawn(1)[:3]]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (DIED, "engine_died"),
        (EngineError("cannot run /secret/graph.onnx"), "engine_failed"),
        (ValueError("at 0x7f1234567890"), "internal_error"),
        (finished(1, 0, "deadline"), "deadline"),
        (finished(1, 0, "cancelled"), None),
        (None, None),
    ],
)
def test_failure_in_a_stream_is_an_event_with_what_there_is(end: Any, code: str | None) -> None:
    events = [*DRAWING, *([] if end is None else [end])]
    request = read(stream=True)
    items: list[bytes] = []

    async def read_all() -> None:
        async for item in responses.stream(request, each(events), context()):
            items.append(item)

    if isinstance(end, ValueError):  # the log is to have it
        with pytest.raises(ValueError):
            asyncio.run(read_all())
    else:
        asyncio.run(read_all())
    *_, last = Server(lambda _: items).client().responses.create(**ask(), stream=True)
    assert isinstance(last, ResponseFailedEvent)
    failed = last.response
    assert failed.status == "failed" and failed.error.code == "server_error"
    assert code is None or failed.error.mmi["code"] == code
    assert "secret" not in failed.error.message and "0x" not in failed.error.message
    statuses = [item.status for item in failed.output]
    assert statuses == ["completed", "completed", "completed", "failed"]
    numbers = [one["sequence_number"] for one in messages_of(items)]
    assert numbers == list(range(len(numbers)))
    # What came can be continued.
    again = read(input=[{"role": "user", "content": TEXT}, *failed.model_dump()["output"]])
    assert same(again.document, [Text(TEXT + "a"), Image(picture(0)), Text(" ring")])


@pytest.mark.parametrize("first", [DIED, finished(0, 0, "deadline")])
def test_failure_before_the_first_event_is_raised(first: Any) -> None:
    request = read(stream=True)
    with pytest.raises(ApiError) as caught:
        collect(responses.stream(request, each([first]), context()))
    with pytest.raises(ApiError):
        run(responses.reply(request, each([first]), context()))
    # Where a keep-alive went out before it, the rest of the stream is a response that failed.
    data = responses.failure(request, caught.value, context())
    items = [responses.KEEP_ALIVE(request, context()), data]
    made = Server(lambda _: items).client()
    kinds = [event.type for event in made.responses.create(**ask(), stream=True)]
    assert kinds == ["response.created", "response.in_progress", "response.failed"]
    with made.responses.stream(**ask()) as helper:
        assert [event.type for event in helper] == kinds


def test_reply_without_an_end_is_an_error() -> None:
    with pytest.raises(ApiError):
        run(responses.reply(read(), each(text("a")), context()))


# Requests


def test_without_the_tool_the_model_draws_nothing_by_itself() -> None:
    assert read(tools=[]).options.max_images == 0
    assert read(tools=None).options.max_images == 0
    assert read().options.max_images == DEFAULTS.max_images
    assert read(mmi={"max_images": 2}).options.max_images == 2
    assert read(max_tool_calls=1).options.max_images == 1
    assert read(max_tool_calls=3, mmi={"max_images": 2}).options.max_images == 2
    assert read(max_tool_calls=1, mmi={"max_images": 2}).options.max_images == 1
    assert read(tool_choice="none").options.max_images == 0
    draw = [{"role": "user", "content": [{"type": "mmi.draw"}]}]
    assert read(tools=[], input=draw).document == document_of(Draw())


def test_tool_choice_that_demands_the_tool_begins_with_a_picture() -> None:
    assert not read().options.draw_first
    for choice in ("required", {"type": "image_generation"}):
        request = read(tool_choice=choice)
        assert request.options.draw_first and request.echo["tool_choice"] == choice


def test_options_are_those_of_the_request() -> None:
    request = read(
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.7,
        top_k=5,
        min_tokens=2,
        repetition_penalty=1.5,
        mmi={"seed": 7, "guidance": 2.0, "schedule": "ddim:8", "full_every": 2, "max_seconds": 5},
    )
    options = request.options
    assert (options.max_tokens, options.temperature, options.top_p, options.top_k) == (
        9,
        0.5,
        0.7,
        5,
    )
    assert (options.min_tokens, options.repetition_penalty, options.seed) == (2, 1.5, 7)
    assert (options.guidance, options.schedule, options.full_every) == (2.0, "ddim:8", 2)
    assert request.max_seconds == 5
    assert read(max_output_tokens=9, ignore_eos=True).options.min_tokens == 9
    assert read().options.seed != read().options.seed


def test_previews_are_made_for_streams_alone() -> None:
    tools = [{**TOOL, "partial_images": 2}]
    assert read(tools=tools).options.previews == 0
    assert read(tools=tools, stream=True).options.previews == 2
    assert read(stream=True, mmi={"partial_images": 3}).options.previews == 3


def test_response_repeats_the_request() -> None:
    given: dict[str, Any] = {
        "instructions": "a ring ",
        "max_output_tokens": 9,
        "max_tool_calls": 2,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "key",
        "safety_identifier": "someone",
        "temperature": 0.5,
        "tool_choice": "required",
        "tools": [{"type": "image_generation", "size": "64x64"}],
        "top_p": 0.7,
        "user": "me",
    }
    client = server([*drawn(0), finished(0, 1)]).client()
    reply = client.responses.create(**ask(**given)).model_dump(exclude_none=True)
    assert {name: reply[name] for name in given} == given
    first = next(iter(client.responses.create(**ask(**given), stream=True)))
    assert first.response.model_dump(exclude_none=True)["tools"] == given["tools"]


NEUTRAL: list[dict[str, Any]] = [
    {"store": True},
    {"store": False},
    {"include": []},
    {"service_tier": "auto"},
    {"parallel_tool_calls": True},
    {"truncation": "disabled"},
    {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
    {"reasoning": {"effort": None}},
    {"background": False},
    {"top_logprobs": 0},
    {"previous_response_id": None},
    {"stream": False},
    {"metadata": {"a": "b"}},
    {"user": "me", "safety_identifier": "me", "prompt_cache_key": "k"},
    {"tool_choice": "auto"},
    {"tools": [{**TOOL, "size": "auto", "quality": "auto", "background": "opaque"}]},
    {"tools": [{**TOOL, "size": "64x64", "moderation": "low", "action": "generate"}]},
]


@pytest.mark.parametrize("more", NEUTRAL, ids=str)
def test_neutral_values_change_nothing(more: dict[str, Any]) -> None:
    seed = {"mmi": {"seed": 7}}
    plain, given = read(**seed), read(**seed, **more)
    assert (given.options, given.document) == (plain.options, plain.document)
    assert (given.transport, given.output_format) == ("inline", "png")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model": "gpt-4"}, "model", "model_not_found"),
    ({"input": 3}, "input", "invalid_type"),
    ({"input": None}, "input", "invalid_type"),
    ({"color": 1}, "color", "unknown_parameter"),
    ({"mmi": {"color": 1}}, "mmi.color", "unknown_parameter"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_value"),
    ({"truncation": "auto"}, "truncation", "unsupported_value"),
    ({"background": True}, "background", "unsupported_value"),
    ({"conversation": "c"}, "conversation", "unsupported_value"),
    ({"include": ["reasoning.encrypted_content"]}, "include", "unsupported_value"),
    ({"reasoning": {"effort": "high"}}, "reasoning", "unsupported_value"),
    ({"text": {"format": {"type": "json_object"}}}, "text.format", "unsupported_value"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [TOOL, TOOL]}, "tools", "invalid_value"),
    ({"tools": [{**TOOL, "size": "512x512"}]}, "tools[0].size", "unsupported_value"),
    ({"tools": [{**TOOL, "quality": "high"}]}, "tools[0].quality", "unsupported_value"),
    ({"tools": [{**TOOL, "partial_images": 4}]}, "tools[0].partial_images", "invalid_value"),
    (
        {"tools": [{**TOOL, "output_compression": 50}]},
        "tools[0].output_compression",
        "conflicting_values",
    ),
    ({"mmi": {"max_images": 50}}, "mmi.max_images", "too_many_images"),
    ({"tools": [{**TOOL, "output_format": "gif"}]}, "tools[0].output_format", "invalid_value"),
    ({"tools": [], "mmi": {"max_images": 1}}, "mmi.max_images", "conflicting_values"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "conflicting_values"),
    (
        {"tool_choice": "required", "max_tool_calls": 0},
        "tool_choice",
        "conflicting_values",
    ),
    ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.type", "invalid_value"),
    ({"max_output_tokens": -1}, "max_output_tokens", "invalid_value"),
    ({"max_output_tokens": 10**6}, "max_output_tokens", "too_many_tokens"),
    ({"max_output_tokens": True}, "max_output_tokens", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "conflicting_values"),
    ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
    ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input[0]", "invalid_value"),
    ({"input": [{"type": "item_reference", "id": "r"}]}, "input[0]", "invalid_value"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role", "invalid_value"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
        "input[0].content[0]",
        "invalid_value",
    ),
    (
        {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "https://example.com/a.png"}],
                }
            ]
        },
        "input[0].content[0].image_url",
        "remote_images_off",
    ),
    (
        {
            "input": [
                {"type": "image_generation_call", "id": "i", "result": "!", "status": "completed"}
            ]
        },
        "input[0].result",
        "invalid_base64",
    ),
]


@pytest.mark.parametrize(("more", "param", "code"), REFUSED, ids=lambda value: str(value)[:60])
def test_refusals_name_the_field(more: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(**more)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.status == (404 if code == "model_not_found" else 400)


def test_every_field_of_the_official_client_is_known() -> None:
    for params, fields in (
        (official.ResponseCreateParamsBase, responses.ResponsesBody),
        (ImageGeneration, responses.ImageTool),
    ):
        names = set(get_type_hints(params))
        assert names and names <= set(fields.model_fields)


def test_examples_of_the_schema_are_read() -> None:
    for example in responses.REQUEST_SCHEMA["examples"]:
        assert responses.read(example, MODEL, LIMITS).document.parts
    assert set(responses.REQUEST_SCHEMA["required"]) == {"model", "input"}


def test_events_without_text_say_nothing() -> None:
    items = collect(
        responses.stream(
            read(stream=True),
            each([TextDelta("", tokens=1), finished(1, 0)]),
            context(),
        )
    )
    kinds = [one["type"] for one in messages_of(items)]
    assert kinds == ["response.created", "response.in_progress", "response.completed"]
