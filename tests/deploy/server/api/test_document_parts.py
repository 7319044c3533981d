"""Messages to documents: order, limits, and replies that come back in each of their forms."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage

from deploy.server.api.served import (
    LIMITS,
    STEPS,
    Surroundings,
    data_url,
    file_of,
    pixels_of,
    random_picture,
    replied,
    streamed,
    tiny,
    told,
)
from mmi_deploy.documents.document import (
    Document,
    Draw,
    Image,
    Part,
    Text,
    document_of,
    encode_document,
)
from mmi_deploy.documents.images import Rgb
from mmi_deploy.server.api import chat
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.settings import RequestLimits

WORDS = "the red blue green circle square moves down up is on left . , what colour".split()


def body(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": list(messages), **more}


def read(*messages: dict[str, Any], limits: RequestLimits = LIMITS, **more: Any) -> ApiRequest:
    return chat.read(body(*messages, **more), tiny(), limits)


def refused(*messages: dict[str, Any], limits: RequestLimits = LIMITS, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(*messages, limits=limits, **more)
    return caught.value


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def picture(rgb: Rgb) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(file_of(rgb)), "detail": "auto"}}


def same(left: Document, right: Document) -> bool:
    """Equality of documents, pictures by their pixels."""

    def plain(document: Document) -> list[Any]:
        return [part.rgb.tobytes() if isinstance(part, Image) else part for part in document.parts]

    return plain(left) == plain(right)


def token_ids(document: Document) -> list[int]:
    model = tiny()
    encoded = encode_document(document, model.tokenizer, model.config)
    found: list[int] = encoded.token_ids.tolist()
    return found


def test_parts_keep_their_order_and_nothing_is_inserted() -> None:
    one, two = random_picture(1), random_picture(2)
    request = read(
        user([picture(one), text("the red "), text("square moves"), {"type": "mmi.draw"}]),
        {"role": "assistant", "content": "down"},
        user("."),
        user([picture(two)]),
    )
    assert same(
        request.document,
        document_of(Image(one), Text("the red square moves"), Draw(), Text("down."), Image(two)),
    )


def test_system_and_developer_messages_come_first_in_their_order() -> None:
    request = read(
        user("up"),
        {"role": "system", "content": [text("the ")]},
        {"role": "assistant", "content": " is red"},
        {"role": "developer", "content": "square moves ", "name": "x"},
    )
    assert request.document == Document((Text("the square moves up is red"),))


def test_messages_and_draw_parts_of_another_role_work_alike() -> None:
    drawn = read({"role": "assistant", "content": [text("red"), {"type": "mmi.draw"}]})
    assert drawn.document == Document((Text("red"), Draw()))
    # What OpenAI's client sends for its own message.
    echo = {
        "role": "assistant",
        "content": "red",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert read(echo, user(" square")).document == Document((Text("red square"),))


# --- replies come back -------------------------------------------------------------------------


def random_parts(rng: random.Random, pictures: int) -> list[str | Rgb]:
    """Texts of words and pictures in any order, also next to each other."""
    parts: list[str | Rgb] = [random_picture(rng.randrange(10**6)) for _ in range(pictures)]
    for _ in range(rng.randint(0 if pictures else 1, 3)):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
        # A text next to another needs the space between them, and one at the end loses its own.
        parts.insert(rng.randint(0, len(parts)), " " + words + rng.choice(["", " ", "\n"]))
    return parts


def split(rng: random.Random, words: str) -> Iterator[str]:
    """The text in pieces, as deltas bring it."""
    begun = 0
    while begun < len(words):
        end = rng.randint(begun + 1, len(words))
        yield words[begun:end]
        begun = end


def as_parts(parts: list[str | Rgb]) -> list[Part]:
    return [Text(part) if isinstance(part, str) else Image(part) for part in parts]


def message_of_stream(data: bytes) -> dict[str, Any]:
    """The message of a stream as a client puts it together, by the indexes of the pictures."""
    message: dict[str, Any] = {"content": "", "images": []}
    for event in data.decode().split("\n\n")[:-2]:
        chunk = json.loads(event.removeprefix("data: "))
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["role"] = delta.get("role", message.get("role"))
            message["content"] += delta.get("content", "")
            for image in delta.get("images", []):
                if image["index"] == len(message["images"]):
                    message["images"].append(image)
                else:
                    known = message["images"][image["index"]]
                    known["image_url"]["url"] += image["image_url"]["url"]
    return message


def ways(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The message as it is, as a list of parts, and as a string where it has no pictures."""
    yield message
    # As the official client's types give it back, with all the fields that they add.
    for kind in (ChatCompletionMessage, ParsedChatCompletionMessage):
        yield kind.model_validate(message).model_dump()
    content, begun = [], 0
    for image in message["images"]:
        offset = image["mmi"]["offset"]
        if message["content"][begun:offset]:
            content.append(text(message["content"][begun:offset]))
        content.append(image)  # with its index and `mmi`, which a client need not take off
        begun = offset
    if message["content"][begun:]:
        content.append(text(message["content"][begun:]))
    yield {"role": "assistant", "content": content}
    if not message["images"]:
        yield {"role": "assistant", "content": message["content"]}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("transport", ["inline", "chunked"])
def test_a_reply_that_comes_back_gives_the_document_that_the_model_had(
    seed: int, transport: str
) -> None:
    rng = random.Random(seed)
    prompt = random_parts(rng, rng.randint(0, 2))
    written = random_parts(rng, rng.randint(0, 3))
    question = [text(part) if isinstance(part, str) else picture(part) for part in prompt]
    had = document_of(*as_parts(prompt)).parts  # when the model began to write
    kept = document_of(*had, *as_parts(written), Text(" what colour"))
    given = sum(not isinstance(part, str) for part in prompt)
    events = told(written, given=given, pieces=lambda words: split(rng, words))
    mmi = {"image_transport": transport}

    whole = read(user(question), mmi=mmi)
    reply = replied(chat, whole, events, Surroundings().context)
    in_pieces = read(user(question), mmi=mmi, stream=True)
    surroundings = Surroundings(event_bytes=3_000)
    stream = streamed(chat, in_pieces, events, surroundings.context)
    messages = [reply["choices"][0]["message"], message_of_stream(stream)]
    for message in messages:
        assert [image["index"] for image in message["images"]] == [*range(len(message["images"]))]
        for way in ways(message):
            again = read(user(question), way, user(" what colour"))
            assert same(again.document, kept)
            assert token_ids(again.document) == token_ids(kept)


@pytest.mark.parametrize("seed", range(10))
def test_usage_counts_the_tokens_of_the_document(seed: int) -> None:
    """Recomputed from the token ids of the whole document: places to draw included."""
    rng, config = random.Random(seed), tiny().config
    prompt = random_parts(rng, rng.randint(0, 2))
    draws = rng.randint(0, 2)
    drawn = [random_picture(seed) for seed in range(draws)]
    question = [text(part) if isinstance(part, str) else picture(part) for part in prompt]
    written = random_parts(rng, rng.randint(0, 2))
    request = read(user([*question, *[{"type": "mmi.draw"}] * draws]))
    # The tokens of a text are words, which arrive one after another.
    events = told([*drawn, *written], pieces=lambda words: re.findall(r"\s*\S+", words))
    usage = replied(chat, request, events, Surroundings().context)["usage"]
    whole = token_ids(document_of(*as_parts(prompt), *as_parts(drawn), *as_parts(written)))
    given = sum(not isinstance(part, str) for part in prompt)
    pictures = draws + sum(not isinstance(part, str) for part in written)
    each = 1 + config.visual_tokens
    assert usage["total_tokens"] == len(whole)
    assert whole.count(config.tokens.boi) == given + pictures
    assert usage["prompt_tokens_details"]["image_tokens"] == given * each
    assert usage["completion_tokens_details"]["image_tokens"] == pictures * each
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]


def test_pictures_by_url_come_back_through_the_fetch_of_the_server() -> None:
    around, rgb = Surroundings(), random_picture(4)
    request = read(user("red"), mmi={"image_transport": "url"})
    message = replied(chat, request, told([" on", rgb, "up"]), around.context)["choices"][0][
        "message"
    ]
    kept = {f"/v1/mmi/images/{n}": data for n, (data, _) in enumerate(around.stored)}
    again = chat.read(body(user("red"), message), tiny(), LIMITS, fetch=kept.__getitem__)
    assert same(again.document, document_of(Text("red on"), Image(rgb), Text("up")))
    assert refused(user("red"), message).code == "remote_images_off"


def test_offsets_count_code_points() -> None:
    """Characters of one, two and four units of UTF-16, and combining ones."""
    words, rgb = "a😀é\u0301🇩🇪ß", random_picture(3)
    reply = replied(chat, read(user("red")), told([words, rgb, "x"]), Surroundings().context)
    message = reply["choices"][0]["message"]
    assert message["images"][0]["mmi"]["offset"] == len(words) == 7
    assert message["content"][:7] == words
    assert np.array_equal(pixels_of(message["images"][0]["image_url"]["url"]), rgb)


def test_pictures_without_an_offset_stand_at_the_end_and_others_in_their_order() -> None:
    one, two, three = (random_picture(seed) for seed in (1, 2, 3))
    images = [picture(one), {**picture(two), "mmi": {"offset": 3}}, {**picture(three), "mmi": {}}]
    images[2] = {**images[2], "index": 2}
    found = read({"role": "assistant", "content": "red square", "images": images}).document
    kept = document_of(Text("red"), Image(two), Text("square"), Image(one), Image(three))
    assert same(found, kept)


def test_an_offset_beyond_the_text_is_refused() -> None:
    images = [{**picture(random_picture(1)), "mmi": {"offset": 4}}]
    error = refused({"role": "assistant", "content": "red", "images": images})
    assert error.param == "messages[0].images[0].mmi.offset" and "3 characters" in error.message


def test_pictures_beside_a_list_of_parts_are_refused() -> None:
    message = {
        "role": "assistant",
        "content": [text("red")],
        "images": [picture(random_picture(1))],
    }
    assert refused(message).param == "messages[0].images"


# --- limits -----------------------------------------------------------------------------------


def test_a_request_that_just_fits_passes_and_one_token_more_names_both_numbers() -> None:
    rgb = random_picture(1)
    room = 512 - 1 - 17  # `<s>` and a picture
    fits = read(user([picture(rgb), text("red " * room)]))
    assert fits.prompt_usage.total == 512 == len(token_ids(fits.document))
    error = refused(user([picture(rgb), text("red " * (room + 1))]))
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert "513" in error.message and "512" in error.message


def test_the_context_is_the_bundles_if_that_is_smaller() -> None:
    with pytest.raises(ApiError) as caught:
        chat.read(body(user("red " * 64)), tiny(context=64), LIMITS)
    assert "65 tokens" in caught.value.message and "64" in caught.value.message
    chat.read(body(user("red " * 63)), tiny(context=64), LIMITS)


def test_places_to_draw_count_in_the_context_and_as_pictures_but_not_in_the_prompt() -> None:
    request = read(user([text("red"), {"type": "mmi.draw"}, text("blue")]))
    assert (request.prompt_usage.text, request.prompt_usage.image) == (3, 0)
    draws = [{"type": "mmi.draw"}] * 31
    assert refused(user(draws)).code == "context_length_exceeded"
    assert "528" in refused(user(draws)).message


def test_limits_are_checked_before_pictures_are_decoded() -> None:
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,!"}}

    def code(*content: dict[str, Any], limits: RequestLimits = LIMITS) -> str:
        return refused(user([broken, *content]), limits=limits).code

    assert code() == "invalid_base64"
    assert code(text("red"), limits=RequestLimits(parts=1)) == "too_many_parts"
    assert code(text("red" * 10), limits=RequestLimits(text_bytes=29)) == "text_too_long"
    assert code(broken, limits=RequestLimits(images=1)) == "too_many_images"
    assert code(*[broken] * 49) == "too_many_images"
    assert code(text("red " * 600)) == "context_length_exceeded"
    assert code(text("frobnicate")) == "invalid_document"


def test_limits_hold_to_the_last_one() -> None:
    limits = RequestLimits(parts=3, text_bytes=9, images=1)
    read(user([text("red"), text(" on"), text(" up")]), limits=limits)
    read(user([{"type": "mmi.draw"}]), limits=limits)
    assert refused(user([text("r")] * 4), limits=limits).code == "too_many_parts"
    assert refused(user("a"), user("a"), user("a"), user("a"), limits=limits).code == (
        "too_many_parts"
    )
    assert refused(user("redredred "), limits=limits).code == "text_too_long"
    assert refused(user([{"type": "mmi.draw"}] * 2), limits=limits).code == "too_many_images"


@pytest.mark.parametrize(
    "content",
    ["", " ", [], [text("")], [text("\n")]],
)
def test_an_empty_document_is_refused(content: Any) -> None:
    assert refused(user(content)).code == "invalid_document"


def test_unknown_words_are_named_without_a_path_and_cut() -> None:
    error = refused(user("red frobnicate " + "y" * 100_000))
    assert "frobnicate" in error.message and "assets" not in error.message
    assert "y" * 50 not in error.message and len(error.message) < 600


def test_special_tokens_in_texts_are_refused() -> None:
    assert refused(user("red <s> blue")).code == "invalid_document"


def test_every_sampler_of_the_model_may_be_asked_for() -> None:
    for name in STEPS:
        assert read(user("red"), mmi={"schedule": name}).options.schedule == name
