"""Bodies of requests, and streams cut at every byte."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import numpy as np
import pytest

from bench.serve.mock_server import Chat, Responses
from mmi_bench.serve.records import RequestRecord
from mmi_bench.serve.sse import EventReader
from mmi_bench.serve.wire import StreamReader, Wire, decoded, quick_png
from mmi_deploy.documents.document import Draw, Image, Text, document_of
from mmi_deploy.errors import ConfigError, MmiError
from mmi_deploy.runtime.options import GenerationOptions

RGB = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
DOCUMENT = document_of(Image(RGB), Text("a red"), Draw())
OPTIONS = GenerationOptions(
    seed=7, max_tokens=9, min_tokens=2, max_images=1, temperature=0.0, top_k=5, stop=("x",)
)


def body(wire: Wire, document: Any = DOCUMENT, options: GenerationOptions = OPTIONS) -> Any:
    return json.loads(wire.body(document, options))


def test_a_chat_body_has_the_document_in_order_and_every_option() -> None:
    found = body(Wire("tiny"))
    (message,) = found.pop("messages")
    assert message["role"] == "user"
    image, text, draw = message["content"]
    data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert (decoded(data) == RGB).all(), "without loss"
    assert (text, draw) == ({"type": "text", "text": "a red"}, {"type": "mmi.draw"})
    assert found == {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 9,
        "seed": 7,
        "temperature": 0.0,
        "top_p": 0.9,
        "top_k": 5,
        "stop": ["x"],
        "modalities": ["text", "image"],
        "mmi": {
            "max_images": 1,
            "image_transport": "inline",
            "min_tokens": 2,
            "progress": True,
        },
    }


def test_a_responses_body_draws_by_its_tool() -> None:
    found = body(Wire("tiny", "responses", previews=2))
    content = found["input"][0]["content"]
    assert [part["type"] for part in content] == ["input_image", "input_text", "mmi.draw"]
    assert found["tools"] == [
        {"type": "image_generation", "output_format": "png", "partial_images": 2}
    ]
    assert found["mmi"]["seed"] == 7 and found["max_output_tokens"] == 9
    text = body(Wire("tiny", "responses"), document_of(Text("a")), GenerationOptions(max_images=0))
    assert "tools" not in text


def test_a_plain_body_has_no_field_of_ours_and_cannot_draw() -> None:
    options = GenerationOptions(max_images=0, min_tokens=4)
    found = body(Wire("m", plain=True), document_of(Text("a")), options)
    assert "mmi" not in found and found["min_tokens"] == 4
    with pytest.raises(ConfigError, match="cannot draw"):
        body(Wire("m", plain=True))


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="--endpoint"):
        Wire("m", "images")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--transport"):
        Wire("m", transport="ftp")  # type: ignore[arg-type]


STREAM = b'data: {"a": 1}\n\n: alive\n\nevent: x\r\ndata: {"b":\r\ndata: 2}\r\n\r\ndata: [DONE]\n\n'
DATA = [b'{"a": 1}', b'{"b":\n2}', b"[DONE]"]


def test_events_are_the_same_wherever_the_stream_is_cut() -> None:
    for first in range(len(STREAM)):
        for second in range(first, len(STREAM), 7):
            reader = EventReader()
            pieces = (STREAM[:first], STREAM[first:second], STREAM[second:])
            assert [data for piece in pieces for data in reader.feed(piece)] == DATA
            assert not reader.unfinished
    reader = EventReader()
    assert [data for byte in STREAM for data in reader.feed(bytes([byte]))] == DATA


def test_a_line_of_many_megabytes_is_read_in_linear_time() -> None:
    reader, piece = EventReader(), b"x" * 65_536
    reader.feed(b"data: ")
    for _ in range(320):
        assert reader.feed(piece) == []
    assert reader.unfinished
    (data,) = reader.feed(b"\n\n")
    assert len(data) == 320 * 65_536


def read(stream: bytes, endpoint: Any = "chat", keep: bool = True) -> RequestRecord:
    """Record of a stream, one event a second."""
    record = RequestRecord(0, "p", 0.0)
    reader = StreamReader(record, endpoint, keep, lambda *_: None)
    for second, data in enumerate(EventReader().feed(stream), 1):
        reader.feed(data, float(second))
    reader.close()
    assert reader.finished == (not record.error)
    return record


PNG = quick_png(RGB)


@pytest.mark.parametrize("transport", ["inline", "chunked"])
def test_a_chat_stream_becomes_events_text_and_pictures(transport: str) -> None:
    chat = Chat({"mmi": {"image_transport": transport, "progress": True}})
    parts = [*chat.text("red "), *chat.start(0), *chat.step(0, 1), *chat.image(0, PNG)]
    size = len(parts) - 3
    record = read(b"".join([*parts, *chat.text("blue"), *chat.end()]))
    assert [(event.time, event.kind) for event in record.events] == [
        (1, "text"),
        (2, "image_start"),
        (3, "progress"),
        (3 + size, "image"),  # whole with its last piece
        (4 + size, "text"),
    ]
    assert record.reply.parts == ["red ", PNG, "blue"]
    assert record.tokens == 2 and record.images == 1 and record.reason == "max_tokens"
    assert record.picture_hashes == [hashlib.sha256(PNG).hexdigest()]
    assert record.text_hash == hashlib.sha256(b"red blue").hexdigest()
    assert record.server == {
        "reason": "max_tokens",
        "queue_seconds": 0.25,
        "stage_seconds": {"decode": 0.5},
    }


def test_pictures_that_are_not_kept_leave_their_hash() -> None:
    chat = Chat({})
    stream = b"".join([*chat.image(0, PNG), *chat.image(1, PNG), *chat.end()])
    record = read(stream, keep=False)
    assert record.reply.parts == [None, None]
    assert record.picture_hashes == [hashlib.sha256(PNG).hexdigest()] * 2


def test_a_responses_stream_becomes_the_same() -> None:
    out = Responses({})
    parts = [*out.text("red "), *out.start(0), *out.step(0, 1), *out.step(0, 2)]
    record = read(
        b"".join([*parts, *out.image(0, PNG), *out.text("blue"), *out.end()]), "responses"
    )
    assert [(event.time, event.kind) for event in record.events] == [
        (2, "text"),  # after response.created
        (3, "image_start"),
        (4, "progress"),
        (5, "preview"),
        (6, "progress"),
        (7, "image"),
        (8, "text"),
    ]
    assert record.reply.parts == ["red ", PNG, "blue"] and record.tokens == 2


def test_token_counts_of_chunks_are_those_of_the_usage() -> None:
    chat = Chat({})
    chat.tokens = 2  # the next chunk holds the text of three tokens
    record = read(b"".join([*chat.text("red blue green"), *chat.text("a"), *chat.end()]))
    assert [event.tokens for event in record.events] == [3, 1] and record.tokens == 4


def test_an_error_in_the_stream_is_the_requests() -> None:
    error = {"error": {"message": "the engine died", "code": "engine_died"}}
    data = f"data: {json.dumps(error)}\n\n".encode()
    assert read(data).error == "engine_died: the engine died"
    failed = {
        "type": "response.failed",
        "response": {"error": {"code": "deadline", "message": "m"}},
    }
    data = f"event: response.failed\ndata: {json.dumps(failed)}\n\n".encode()
    assert read(data, "responses").error == "deadline: m"


def test_a_damaged_picture_is_named() -> None:
    with pytest.raises(MmiError, match="cannot be decoded"):
        decoded(b"PNG")
