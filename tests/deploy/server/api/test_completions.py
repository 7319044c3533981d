"""Completions: prompts of text and of token ids, replies, and streams for their clients."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest
from openai.types import Completion, completion_create_params

from deploy.server.api.served import (
    LIMITS,
    Surroundings,
    items_of,
    replied,
    streamed,
    tiny,
    told,
)
from deploy.server.api.stream_readers import sglang, vllm
from mmi_deploy.documents.document import Document, Text
from mmi_deploy.errors import EngineError
from mmi_deploy.runtime.events import TextDelta
from mmi_deploy.server.api import completions
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.settings import RequestLimits

WORDS = "the red square moves down."
TEXT = ["the ", "squäre 😀", "\u2028blue\n\n"]


def read(limits: RequestLimits = LIMITS, **more: Any) -> ApiRequest:
    return completions.read({"model": "tiny", "prompt": WORDS, **more}, tiny(), limits)


def refused(limits: RequestLimits = LIMITS, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(limits, **more)
    return caught.value


def test_defaults_are_those_of_the_endpoint() -> None:
    request = read()
    assert request.options.max_tokens == 16 and request.options.max_images == 0
    assert request.document == Document((Text(WORDS),))
    assert (request.prompt_usage.text, request.prompt_usage.image) == (7, 0)
    assert read(RequestLimits(tokens=5)).options.max_tokens == 5
    assert read(max_tokens=0).options.max_tokens == 0


def test_options_arrive() -> None:
    request = read(max_tokens=9, seed=3, min_tokens=2, stop="up", ignore_eos=True, temperature=0)
    found = request.options
    assert (found.seed, found.max_tokens, found.min_tokens) == (3, 9, 9)
    assert (found.stop, found.temperature) == (("up",), 0)
    assert read(mmi={"seed": 4, "max_seconds": 2}).max_seconds == 2


def test_a_beam_search_stands_for_a_temperature_of_0() -> None:
    found = read(mmi={"beams": 3, "length_penalty": 0.5, "early_stopping": True}).options
    assert (found.beams, found.length_penalty, found.early_stopping) == (3, 0.5, True)
    assert found.temperature == 0
    for wrong, param in (
        ({"mmi": {"beams": 3}, "temperature": 0.7}, "temperature"),
        ({"mmi": {"beams": 9}}, "mmi.beams"),  # more than a run has rows
        ({"mmi": {"length_penalty": 0.5}}, "mmi.length_penalty"),
    ):
        error = refused(**wrong)
        assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize("begin", [[], [1]])
def test_prompts_of_token_ids_are_their_text(begin: list[int]) -> None:
    ids = begin + tiny().tokenizer.encode(WORDS)
    for prompt in (ids, [ids], [WORDS]):
        assert read(prompt=prompt).document == Document((Text(WORDS),))


def test_token_ids_that_are_not_those_of_their_text_are_refused() -> None:
    ids = tiny().tokenizer.encode(WORDS)
    for prompt in ([1, 1, *ids], [*ids, 2], [3, *ids], [0], [*ids, 4], [1], []):
        error = refused(prompt=prompt)
        assert error.status == 400 and error.code in ("inexact_tokens", "invalid_document")
    assert refused(prompt=[112]).code == "invalid_value"


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("prompt", None, "invalid_type"),
        ("prompt", ["a", "b"], "invalid_value"),
        ("prompt", [[1], [2]], "invalid_value"),
        ("prompt", ["a", 3], "invalid_value"),
        ("prompt", [3, "a"], "invalid_type"),
        ("prompt", {"a": 1}, "invalid_type"),
        ("prompt", "", "invalid_document"),
        ("prompt", [-1], "invalid_value"),
        ("prompt", [True], "invalid_type"),
        ("echo", True, "unsupported_value"),
        ("suffix", "x", "unsupported_value"),
        ("logprobs", 1, "unsupported_value"),
        ("logprobs", 0, "unsupported_value"),
        ("n", 2, "unsupported_value"),
        ("best_of", 2, "unsupported_value"),
        ("max_tokens", -1, "invalid_value"),
        ("max_tokens", 600, "too_many_tokens"),
        ("mmi", {"max_images": 1}, "unknown_parameter"),
        ("messages", [], "unknown_parameter"),
        ("model", "x", "model_not_found"),
    ],
)
def test_refusals(name: str, value: Any, code: str) -> None:
    error = refused(**{name: value})
    assert error.code == code
    assert code == "invalid_document" or error.param is not None and error.param.startswith(name)


def test_neutral_values_pass() -> None:
    neutral = {"echo": False, "suffix": None, "logprobs": None, "n": 1, "best_of": 1, "user": "x"}
    assert read(**neutral, stream=False, stop=None, repetition_penalty=1.0).options.max_tokens == 16


def test_every_parameter_of_the_official_client_is_known() -> None:
    hints = get_type_hints(completion_create_params.CompletionCreateParamsStreaming)
    assert not set(hints) - set(completions.REQUEST_SCHEMA["properties"])


def test_a_reply() -> None:
    reply = replied(completions, read(), told(TEXT, "max_tokens"), Surroundings(3).context)
    found = Completion.model_validate_json(json.dumps(reply), strict=True)
    assert found.choices[0].text == "".join(TEXT)
    assert (found.choices[0].finish_reason, found.id) == ("length", "cmpl-abc")
    assert found.usage is not None and found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (7, 3)
    assert found.usage.prompt_tokens_details.cached_tokens == 3
    assert reply["mmi"]["reason"] == "max_tokens" and reply["mmi"]["seed"] >= 0


def test_a_stream_is_read_however_it_is_cut() -> None:
    options = {"include_usage": True}
    request = read(stream=True, stream_options=options)
    data = streamed(completions, request, told(TEXT), Surroundings().context)
    plain = streamed(completions, read(stream=True), told(TEXT), Surroundings().context)
    for place in range(len(data) + 1):
        heard = vllm([data[:place], data[place:]], completions=True)
        assert heard.text == "".join(TEXT) and heard.tokens == 4 and heard.done
        assert heard.usage is not None and heard.usage["completion_tokens"] == 3
    for place in range(len(plain) + 1):
        heard = sglang([plain[:place], plain[place:]], completions=True)
        assert heard.text == "".join(TEXT) and heard.tokens == 3
    for chunk in heard.chunks:
        Completion.model_validate_json(
            json.dumps({**chunk, "choices": []}), strict=True
        )  # a chunk's reason may be null


def test_usage_grows_with_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    request = read(stream=True, stream_options=options)
    data = streamed(completions, request, told(TEXT), Surroundings().context)
    chunks = vllm([data], completions=True).chunks
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 3, 3]


def test_failures() -> None:
    request, context = read(stream=True), Surroundings().context
    items = items_of(completions, request, [TextDelta("a"), EngineError("/x")], context)
    assert json.loads(items[-1].removeprefix(b"data: "))["error"]["code"] == "engine_failed"
    with pytest.raises(EngineError):
        items_of(completions, request, [EngineError("/x")], context)
    with pytest.raises(ApiError, match="ended after"):
        replied(completions, request, told(["a"], "deadline"), context)
    alive = json.loads(completions.KEEP_ALIVE(request, context).removeprefix(b"data: "))
    assert alive["choices"] == [] and alive["object"] == "text_completion"
