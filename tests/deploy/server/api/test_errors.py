"""Errors of the API: of what kind, and what they never tell."""

from __future__ import annotations

import json

import pytest

from mmi_deploy.errors import (
    BundleError,
    BusyError,
    ConfigError,
    DocumentError,
    EngineError,
    WeightsError,
)
from mmi_deploy.server.api import sse
from mmi_deploy.server.api.errors import ApiError, api_error_of, public


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (DocumentError("x"), 400, "invalid_document", "invalid_request_error"),
        (ConfigError("x"), 400, "invalid_value", "invalid_request_error"),
        (BusyError("x"), 429, "queue_full", "rate_limit_error"),
        (EngineError("x"), 500, "engine_failed", "server_error"),
        (BundleError("x"), 500, "engine_failed", "server_error"),
        (WeightsError("x"), 500, "engine_failed", "server_error"),
        (MemoryError(), 500, "internal_error", "server_error"),
        (ZeroDivisionError("/x"), 500, "internal_error", "server_error"),
    ],
)
def test_kinds(error: Exception, status: int, code: str, kind: str) -> None:
    found = api_error_of(error, param="p")
    assert (found.status, found.code) == (status, code)
    assert found.body()["error"]["type"] == kind


def test_an_error_of_the_api_stays_as_it_is() -> None:
    error = ApiError(504, "deadline", "x")
    assert api_error_of(error, param="p") is error


def test_a_full_queue_says_when_to_come_again() -> None:
    headers = api_error_of(BusyError("full"), retry_after=7).headers()
    assert headers == {"x-should-retry": "true", "retry-after": "7"}
    assert api_error_of(EngineError("x")).headers() == {"x-should-retry": "false"}


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        ("cannot read /srv/models/tiny/llm.onnx: no such file", "cannot read …: no such file"),
        ("run `mmi inspect /srv/tiny` to list", "run `mmi inspect …` to list"),
        ("cannot identify <_io.BytesIO object at 0x7f00deadbeef>", "at …>"),
        ("see ~/models/x and ../y/z, ./w", "see … and …, …"),
        (r"C:\models\tiny is not there", "… is not there"),
        ("red and/or blue, 1/2 of 3 / 4", "red and/or blue, 1/2 of 3 / 4"),
        ("0x12 is short", "0x12 is short"),
        ("the text holds '</s>'", "the text holds '</s>'"),
    ],
)
def test_paths_and_addresses_are_left_out(message: str, kept: str) -> None:
    assert kept in public(message)


def test_long_messages_are_cut() -> None:
    assert len(public("x" * 10**6)) == 500
    assert "secret" not in api_error_of(EngineError("secret")).message
    assert "secret" not in api_error_of(RuntimeError("secret")).message


def test_an_event_is_one_line_of_ascii() -> None:
    item = sse.data({"a": "é\u2028\x85\n\r\ud800"})
    assert item.isascii() and item.count(b"\n") == 2 and item.endswith(b"\n\n")
    assert len(item.decode().splitlines()) == 2
    assert json.loads(item[6:])["a"] == "é\u2028\x85\n\r\ud800"
    assert sse.event({"type": "response.created"}).startswith(b"event: response.created\ndata: {")
    with pytest.raises(ValueError):
        sse.data({"a": float("nan")})
