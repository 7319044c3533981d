"""The official client, strict, over all endpoints of a real server: every reply is what `generate`
gives in process for the same seed, text and pixels."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import openai
import pytest

from deploy.server.reference import alone, pictures_of, runtime_of, text_of
from deploy.server.requests import content, picture, rgb_of, rgb_of_url
from deploy.server.server_process import ServerProcess
from mmi_deploy.documents.document import Document, Draw, Image, Text
from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.events import ImageProgress
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import GenerationOptions

Result = TypeVar("Result")

WORDS = "the red square moves down."
GIVEN = picture(1)
PARTS = (GIVEN, WORDS, None)
DOCUMENT = Document((Image(GIVEN), Text(WORDS), Draw()))
TOOL: Any = [{"type": "image_generation"}]
SEED, TOKENS = 7, 16


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        api_key="-",
        base_url=f"{server.address}/v1",
        max_retries=0,
        _strict_response_validation=True,
    ) as found:
        yield found


@pytest.fixture
def in_loop(server: ServerProcess) -> Callable[..., Any]:
    """Runs a coroutine with an asynchronous client."""

    def run(work: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Result]]) -> Result:
        async def steps() -> Result:
            async with openai.AsyncOpenAI(
                api_key="-",
                base_url=f"{server.address}/v1",
                max_retries=0,
                _strict_response_validation=True,
            ) as found:
                return await work(found)

        return asyncio.run(steps())

    return run


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[str | Rgb]:
    parts, _ = alone(bundle, DOCUMENT, seed=SEED, max_tokens=TOKENS, max_images=1)
    assert len(pictures_of(parts)) == 2, "one that is asked for, and one of the model's own"
    return parts


def check_pictures(found: list[Rgb], expected: list[str | Rgb]) -> None:
    pictures = pictures_of(expected)
    assert len(found) == len(pictures)
    for one, other in zip(found, pictures, strict=True):
        np.testing.assert_array_equal(one, other)


CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": content(*PARTS)}],
    "max_completion_tokens": TOKENS,
    "seed": SEED,
    "extra_body": {"mmi": {"max_images": 1}},
}


def check_message(message: Any, expected: list[str | Rgb]) -> None:
    assert message.content == text_of(expected)
    images = message.images
    check_pictures([rgb_of_url(image["image_url"]["url"]) for image in images], expected)
    # Put in at their offsets, they are the document in its order.
    parts: list[str] = []
    for part in expected:
        parts.append(part if isinstance(part, str) else "")
    offsets, length = [], 0
    for part in expected:
        if isinstance(part, str):
            length += len(part)
        else:
            offsets.append(length)
    assert [image["mmi"]["offset"] for image in images] == offsets


def test_chat(client: openai.OpenAI, expected: list[str | Rgb]) -> None:
    reply = client.chat.completions.create(**CHAT)
    check_message(reply.choices[0].message, expected)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.system_fingerprint and reply.system_fingerprint.startswith("mmi-")


def test_chat_in_a_stream(client: openai.OpenAI, expected: list[str | Rgb]) -> None:
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options=options))
    first = chunks[0].choices[0].delta
    assert first.role == "assistant" and (first.content or first.images)
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == text_of(expected)
    urls = [one["image_url"]["url"] for delta in deltas for one in getattr(delta, "images", ())]
    check_pictures([rgb_of_url(url) for url in urls], expected)


@pytest.mark.parametrize("transport", ["inline", "chunked"])
def test_chat_with_the_helper_of_streams(
    client: openai.OpenAI, expected: list[str | Rgb], transport: str
) -> None:
    body = {**CHAT, "extra_body": {"mmi": {"max_images": 1, "image_transport": transport}}}
    with client.chat.completions.stream(**body) as stream:
        for _ in stream:
            pass
        reply = stream.get_final_completion()
    check_message(reply.choices[0].message, expected)


def test_chat_of_the_asynchronous_client(
    in_loop: Callable[..., Any], expected: list[str | Rgb]
) -> None:
    async def work(client: openai.AsyncOpenAI) -> None:
        whole = client.chat.completions.create(**CHAT)

        async def streamed() -> Any:
            async with client.chat.completions.stream(**CHAT) as stream:
                async for _ in stream:
                    pass
                return await stream.get_final_completion()

        for reply in await asyncio.gather(whole, streamed()):
            check_message(reply.choices[0].message, expected)

    in_loop(work)


RESPONSE: dict[str, Any] = {
    "model": "tiny",
    "input": [
        {
            "role": "user",
            "content": [
                {
                    "type": "input_image",
                    "image_url": content(GIVEN)[0]["image_url"]["url"],
                    "detail": "auto",
                },
                {"type": "input_text", "text": WORDS},
                {"type": "mmi.draw"},
            ],
        }
    ],
    "tools": TOOL,
    "max_output_tokens": TOKENS,
    "extra_body": {"mmi": {"seed": SEED, "max_images": 1}},
}


def check_response(response: Any, expected: list[str | Rgb]) -> None:
    """The output's items are the parts in their order."""
    found: list[str | Rgb] = []
    for item in response.output:
        if item.type == "message":
            found.append("".join(part.text for part in item.content))
        else:
            assert item.type == "image_generation_call" and item.status == "completed"
            found.append(rgb_of(base64.b64decode(item.result)))
    assert [type(part) for part in found] == [type(part) for part in expected]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other) if isinstance(other, np.ndarray) else one == other
    assert response.status == "completed"


def test_responses(client: openai.OpenAI, expected: list[str | Rgb]) -> None:
    response = client.responses.create(**RESPONSE)
    check_response(response, expected)
    assert response.output_text == text_of(expected)


def previews(bundle: Path, document: Document, **options: Any) -> int:
    """Number of previews, of at most two for a picture."""
    chosen = GenerationOptions(seed=SEED, previews=2, **options)
    events = generate(runtime_of(bundle), document, chosen)
    return sum(isinstance(one, ImageProgress) and one.preview is not None for one in events)


def test_responses_in_a_stream_with_partial_pictures(
    client: openai.OpenAI, expected: list[str | Rgb], bundle: Path
) -> None:
    body = {**RESPONSE, "tools": [{**TOOL[0], "partial_images": 2}]}
    with client.responses.stream(**body) as stream:
        events = list(stream)
        check_response(stream.get_final_response(), expected)
    assert events[0].type == "response.created"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    partial = [one for one in events if one.type.endswith(".partial_image")]
    assert len(partial) == previews(bundle, DOCUMENT, max_tokens=TOKENS, max_images=1)


def test_responses_of_the_asynchronous_client(
    in_loop: Callable[..., Any], expected: list[str | Rgb]
) -> None:
    async def work(client: openai.AsyncOpenAI) -> None:
        whole = client.responses.create(**RESPONSE)

        async def streamed() -> Any:
            async with client.responses.stream(**RESPONSE) as stream:
                async for _ in stream:
                    pass
                return await stream.get_final_response()

        for response in await asyncio.gather(whole, streamed()):
            check_response(response, expected)

    in_loop(work)


def test_the_next_turn_is_sent_with_the_output_of_the_first(
    client: openai.OpenAI, expected: list[str | Rgb], bundle: Path
) -> None:
    response = client.responses.create(**RESPONSE)
    again: Any = RESPONSE["input"] + [item.model_dump() for item in response.output]
    again += [{"role": "user", "content": [{"type": "input_text", "text": " the"}]}]
    body = {**RESPONSE, "input": again, "max_output_tokens": 4}
    body["extra_body"] = {"mmi": {"seed": SEED, "max_images": 0}}
    second = client.responses.create(**body)
    read = [Text(part) if isinstance(part, str) else Image(part) for part in expected]
    parts = (Image(GIVEN), Text(WORDS), *read, Text(" the"))
    wanted, _ = alone(bundle, Document(parts), seed=SEED, max_tokens=4, max_images=0)
    assert second.output_text == text_of(wanted)
    assert second.usage.input_tokens_details.cached_tokens > 0


def test_completions(client: openai.OpenAI, bundle: Path, in_loop: Callable[..., Any]) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": WORDS, "seed": SEED, "max_tokens": TOKENS}
    wanted, _ = alone(bundle, Document((Text(WORDS),)), seed=SEED, max_tokens=TOKENS, max_images=0)
    assert client.completions.create(**body).choices[0].text == text_of(wanted)
    chunks = client.completions.create(**body, stream=True)
    assert "".join(one.text for chunk in chunks for one in chunk.choices) == text_of(wanted)

    async def work(client: openai.AsyncOpenAI) -> str:
        return (await client.completions.create(**body)).choices[0].text

    assert in_loop(work) == text_of(wanted)


def test_pictures(client: openai.OpenAI, bundle: Path, in_loop: Callable[..., Any]) -> None:
    document = Document((Text(WORDS), Draw()))
    wanted = [
        pictures_of(alone(bundle, document, seed=SEED + i, max_tokens=0, max_images=0)[0])[0]
        for i in range(2)
    ]
    body: dict[str, Any] = {"model": "tiny", "prompt": WORDS, "n": 2}
    body["extra_body"] = {"mmi": {"seed": SEED}}

    def check(data: list[Any]) -> None:
        for one, other in zip(data, wanted, strict=True):
            np.testing.assert_array_equal(rgb_of(base64.b64decode(one.b64_json)), other)

    check(client.images.generate(**body).data)
    single: dict[str, Any] = {**body, "n": 1, "partial_images": 2}
    events: list[Any] = list(client.images.generate(**single, stream=True))
    shown = previews(bundle, document, max_tokens=0, max_images=0)
    assert [event.type for event in events[:-1]] == ["image_generation.partial_image"] * shown
    assert events[-1].type == "image_generation.completed"
    np.testing.assert_array_equal(rgb_of(base64.b64decode(events[-1].b64_json)), wanted[0])

    async def work(client: openai.AsyncOpenAI) -> None:
        check((await client.images.generate(**body)).data)

    in_loop(work)


def test_models(client: openai.OpenAI, in_loop: Callable[..., Any]) -> None:
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError) as told:
        client.models.retrieve("other")
    assert told.value.code == "model_not_found"

    async def work(client: openai.AsyncOpenAI) -> list[str]:
        return [one.id async for one in client.models.list()]

    assert in_loop(work) == ["tiny"]


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(**{**CHAT, "n": 2})
    assert told.value.param == "n" and told.value.code and told.value.request_id
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="tiny", input="the", previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="the")
