"""The Triton model against a mock of the backend: streams, errors, cancellation, the last flag."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from deploy.runtime.fake_model import fake_runtime, picture
from deploy.server.triton.mock_backend import Request, TritonError, backend
from mmi_deploy.batching.batch_engine import BatchEngine
from mmi_deploy.batching.executor import Executor
from mmi_deploy.documents.document import Image, document_of
from mmi_deploy.documents.images import FORMATS, to_png
from mmi_deploy.errors import DocumentError, EngineError
from mmi_deploy.runtime.events import Finished, ImageDone, TextDelta
from mmi_deploy.runtime.generation import generate
from mmi_deploy.runtime.options import options_of
from mmi_deploy.server.api import pictures
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.settings import RequestLimits
from mmi_deploy.server.triton.model import TritonPythonModel
from mmi_deploy.server.triton.request import read_request

BUNDLE = "/somewhere/bundles/mine"
SLOTS = 3

# A path or an address.
PRIVATE = re.compile(r"0x[0-9a-f]{6}|/(?:tmp|home|root|work|somewhere|usr)\b|\.py\b")


def data_url(rgb: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(to_png(rgb)).decode()


DOCUMENTS: list[dict[str, Any]] = [
    {"parts": [{"text": "w6 w7"}], "seed": 3, "max_tokens": 6, "max_images": 0},
    {"parts": [{"image": data_url(picture(1))}, {"text": "w5"}, {"draw": True}], "max_images": 1},
    {"parts": [{"draw": True}, {"text": "w8"}, {"draw": True}], "guidance": 2, "max_tokens": 3},
    {"parts": [{"text": "w10"}], "logit_bias": {"12": 100}, "stop": [" w12 w12"], "max_images": 0},
]


def request(body: object, **more: Any) -> Request:
    return Request(body if isinstance(body, bytes) else json.dumps(body).encode(), **more)


def expected(body: dict[str, Any]) -> tuple[str, list[bytes], str]:
    """Text, pictures and reason that `generate` gives."""
    parsed = read_request(json.dumps(body).encode(), 16, 6, RequestLimits())
    text, pictures = "", []
    for event in generate(fake_runtime()[0], parsed.document, parsed.options):
        match event:
            case TextDelta():
                text += event.text
            case ImageDone():
                pictures.append(event.rgb.tobytes())
            case Finished():
                return text, pictures, event.reason
    raise AssertionError


def answer(sent: Request) -> tuple[str, list[bytes], str]:
    """Text, pictures and reason of a request that has ended."""
    events, images = sent.sender.events, sent.sender.images
    drawn = [n for n, event in enumerate(events) if event["type"] == "image.done"]
    assert sorted(images) == drawn
    text = "".join(event["text"] for event in events if event["type"] == "text")
    return text, [images[number].tobytes() for number in drawn], events[-1]["reason"]


@pytest.fixture
def logged() -> Iterator[list[str]]:
    with backend() as lines:
        yield lines


@pytest.fixture
def model(logged: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[TritonPythonModel]:
    opened: dict[str, Any] = {}

    def fake_engine(bundle: str, *, slots: int | None, **options: Any) -> BatchEngine:
        opened.update(bundle=bundle, slots=slots, **options)
        return BatchEngine(fake_runtime()[0], slots=slots)

    monkeypatch.setattr(BatchEngine, "open", fake_engine)
    parameters = {
        "bundle": BUNDLE, "slots": str(SLOTS), "target": "cpu", "kernels": "none", "threads": "2"
    }  # fmt: skip
    config = {"parameters": {key: {"string_value": text} for key, text in parameters.items()}}
    found = TritonPythonModel()
    found.initialize({"model_config": json.dumps(config), "model_instance_device_id": "1"})
    assert opened == {
        "bundle": BUNDLE, "slots": SLOTS, "target": "cpu", "kernels": "none", "threads": 2,
        "device": 1,
    }  # fmt: skip
    yield found
    found.finalize()


def test_all_requests_at_once_get_what_generate_gives(model: TritonPythonModel) -> None:
    sent = [request(body) for body in 4 * DOCUMENTS]
    model.execute(sent[:9])
    model.execute(sent[9:])
    for one, body in zip(sent, 4 * DOCUMENTS, strict=True):
        one.sender.wait()
        assert answer(one) == expected(body) and one.sender.finals == 1


def test_events_of_a_stream(model: TritonPythonModel) -> None:
    sent = request({**DOCUMENTS[1], "max_images": 0, "max_tokens": 2})
    model.execute([sent])
    sent.sender.wait()
    drawn, *rest = sent.sender.events
    assert drawn == {"type": "image.started", "index": 1, "steps": 4}
    assert rest[:4] == [
        {"type": "image.progress", "index": 1, "step": n, "steps": 4} for n in (1, 2, 3, 4)
    ]
    assert rest[4] == {"type": "image.done", "index": 1}
    image = sent.sender.images[5]
    assert image.dtype == np.uint8 and image.ndim == 3 and image.flags.c_contiguous
    last = rest[-1]
    assert (last["type"], last["tokens"], last["images"]) == ("finished", 2, 1)
    assert rest[-2]["tokens"] == 2
    assert set(last["stats"]) == {"queued", "first", "total", "given", "cached"}
    assert last["stages"]["denoise"] > 0


@pytest.mark.parametrize(
    "body, says",
    [
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        ([], "not a document"),
        ({"text": "w5"}, "not a document"),
        ({"parts": []}, "empty"),
        ({"parts": "w5"}, "empty"),
        ({"parts": [{"txt": "w5"}]}, "part 1"),
        ({"parts": [{"text": "w5"}], "sed": 1}, "nearest one is seed"),
        ({"parts": [{"text": "w5"}], "logprobs": 1}, "unknown"),
        ({"parts": [{"text": "w5"}], "seed": -1}, "seed"),
        ({"parts": [{"text": "w99"}]}, "does not know 'w99'"),
        ({"parts": [{"text": "w5 " * 99}]}, "too long"),
        ({"parts": [{"draw": True}] * 7}, "too many pictures"),
        ({"parts": [{"image": "a.png"}]}, "`image 1` is no data URL"),
        ({"parts": [{"image": "/etc/passwd"}]}, "no data URL"),
        ({"parts": [{"image": "http://127.0.0.1/a.png"}]}, "no data URL"),
        ({"parts": [{"image": "data:text/html;base64,AAAA"}]}, "must be a data URL"),
        ({"parts": [{"image": "data:image/png;base64,A%"}]}, "not base64"),
        ({"parts": [{"image": "data:image/svg+xml;base64,PHN2Zz4="}]}, "cannot be read"),
    ],
)
def test_a_bad_request_is_refused_and_the_next_one_answered(
    model: TritonPythonModel, logged: list[str], body: object, says: str
) -> None:
    bad, good = request(body), request(DOCUMENTS[0])
    model.execute([bad, good])
    for one in (bad, good):
        one.sender.wait()
    error = bad.sender.error
    assert says in error.message and error.code == TritonError.INVALID_ARG
    assert not PRIVATE.search(error.message.replace("/etc/passwd", "")), error.message
    assert answer(good) == expected(DOCUMENTS[0]) and not logged


def test_the_bundle_of_the_server_is_not_in_an_error(model: TritonPythonModel) -> None:
    model._engine.runtime.tokenizer._folder = Path(BUNDLE)
    sent = request({"parts": [{"text": "w99"}]})
    model.execute([sent])
    sent.sender.wait()
    assert "`mmi inspect …" in sent.sender.error.message


def test_a_request_without_its_input_is_an_error(
    model: TritonPythonModel, logged: list[str]
) -> None:
    sent = Request(None)
    model.execute([sent])
    assert sent.sender.error.code == TritonError.INTERNAL and len(logged) == 1


def test_damaged_pictures_of_every_format_tell_nothing_of_the_server() -> None:
    random = np.random.default_rng(0)
    for kind in FORMATS:
        file = io.BytesIO()
        PIL.Image.fromarray(picture(2, 24)).save(file, kind)
        whole = bytearray(file.getvalue())
        for _ in range(60):
            data = whole[: random.integers(len(whole))]
            for place in random.integers(0, max(len(data), 1), 3):
                data[place : place + 1] = random.bytes(1)
            url = "data:image/png;base64," + base64.b64encode(data).decode()
            try:
                read_request(
                    json.dumps({"parts": [{"image": url}]}).encode(), 16, 6, RequestLimits()
                )
            except ApiError as error:
                assert "image 1" in str(error) and not PRIVATE.search(str(error)), error


def test_limits_are_checked_before_what_they_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("decoded")

    url = data_url(picture(1))
    body = json.dumps({"parts": [{"text": "w5"}, {"image": url}, {"image": url}]}).encode()
    for limits, images, says in (
        (RequestLimits(body_bytes=len(body) - 1), 6, "the request is too large"),
        (RequestLimits(parts=2), 6, "at most 2 parts"),
        (RequestLimits(text_bytes=1), 6, "at most 1 characters"),
        (RequestLimits(image_bytes=10), 6, "image 1` has"),
        (RequestLimits(), 1, "too many pictures"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(pictures.Image, "open", never)
            with pytest.raises((DocumentError, ApiError), match=says):
                read_request(body, 16, images, limits)
    assert len(read_request(body, 16, 2, RequestLimits()).document.parts) == 3


def test_a_request_is_a_line_of_a_jsonl_with_pictures_inside() -> None:
    body = {"id": "a", "parts": DOCUMENTS[1]["parts"], "seed": 7, "logit_bias": {"5": -1}}
    read = read_request(json.dumps(body).encode(), 16, 6, RequestLimits())
    assert read.id == "a" and read.options == options_of({"seed": 7, "logit_bias": {5: -1}})
    given = read.document.parts[0]
    assert isinstance(given, Image) and (given.rgb == picture(1)).all()
    assert read.document == document_of(given, *read.document.parts[1:])


@pytest.mark.parametrize("after", ["image.started", "image.progress", "text"])
def test_a_client_that_leaves_frees_its_slot(model: TritonPythonModel, after: str) -> None:
    long = {"parts": [{"text": "w5"}], "turn_tokens": 2, "max_images": 5}
    gone = [request({**long, "seed": seed}) for seed in range(SLOTS)]
    model.execute(gone)
    for one in gone:
        one.sender.wait(lambda s: s.finals or any(e["type"] == after for e in s.events))
        one.sender.left = True
    for one in gone:
        one.sender.wait()
        assert one.sender.events[-1]["reason"] in ("cancelled", "context", "max_images")
    stats = model._engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    later = request(DOCUMENTS[0])
    model.execute([later])
    later.sender.wait()
    assert answer(later) == expected(DOCUMENTS[0])


def test_a_client_that_leaves_while_it_waits_is_not_begun(model: TritonPythonModel) -> None:
    running = [request({**DOCUMENTS[2], "turn_tokens": 1, "seed": seed}) for seed in range(SLOTS)]
    waiting = request(DOCUMENTS[0])
    waiting.sender.left = True
    model.execute([*running, waiting])
    for one in (waiting, *running):
        one.sender.wait()
    end = waiting.sender.events[-1]
    assert (end["reason"], end["tokens"]) in {("cancelled", 0), ("cancelled", 1)}
    assert all(one.sender.events[-1]["reason"] != "cancelled" for one in running)


def test_the_timeout_of_a_request_is_its_deadline(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    submit = model._engine.submit

    def noted(*arguments: Any, max_seconds: float, **options: Any) -> Any:
        given.append(max_seconds)
        return submit(*arguments, max_seconds=max_seconds, **options)

    monkeypatch.setattr(model._engine, "submit", noted)
    sent = [request(DOCUMENTS[0], microseconds=n) for n in (0, 2_500_000, 10**12)]
    for one in sent:
        model.execute([one])
        one.sender.wait()
    assert given == [600, 2.5, 600]


def test_an_error_of_the_engine_is_in_the_log_alone(
    model: TritonPythonModel, logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise EngineError("no memory for /somewhere/llm.onnx at 0x7f0011223344")

    monkeypatch.setattr(Executor, "prefill", broken)
    sent = request(DOCUMENTS[0])
    model.execute([sent])
    sent.sender.wait()
    error = sent.sender.error
    assert error.code == TritonError.INTERNAL and not PRIVATE.search(error.message)
    assert any("/somewhere/llm.onnx" in line for line in logged)


@pytest.mark.parametrize("at", [0, 2, 5])
def test_the_last_flag_is_sent_where_a_response_cannot_be(
    model: TritonPythonModel, at: int
) -> None:
    sent = request(DOCUMENTS[1])
    sent.sender.broken = lambda number: number >= at
    model.execute([sent])
    sent.sender.wait()
    assert sent.sender.finals == 1 and len(sent.sender.responses) == at
    stats = model._engine.stats()
    later = request(DOCUMENTS[0])
    model.execute([later])
    later.sender.wait()
    assert answer(later) == expected(DOCUMENTS[0]) and stats.slots == SLOTS


def test_requests_beyond_the_queue_are_refused_before_they_are_read(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_most", 0)
    sent = request(b"{")
    model.execute([sent])
    sent.sender.wait()
    assert sent.sender.error.code == TritonError.UNAVAILABLE
    assert "queue is full" in sent.sender.error.message


def test_the_end_of_the_model_ends_all_streams(
    logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BatchEngine(fake_runtime()[0], slots=1)
    monkeypatch.setattr(BatchEngine, "open", lambda *_, **__: engine)
    found = TritonPythonModel()
    found.initialize(
        {"model_config": json.dumps({"parameters": {"bundle": {"string_value": "b"}}})}
    )
    sent = [request({**DOCUMENTS[2], "turn_tokens": 1, "seed": n}) for n in range(4)]
    found.execute(sent)
    sent[0].sender.wait(lambda sender: sender.responses)
    found.finalize()
    assert [one.sender.finals for one in sent] == [1, 1, 1, 1]
    assert not found._thread.is_alive()
