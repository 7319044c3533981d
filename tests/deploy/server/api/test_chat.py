"""Chat completions: options, whole replies, usage, and refusals that name their field."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import numpy as np
import pytest
from openai.types.chat import ChatCompletion, completion_create_params

from deploy.server.api.served import (
    LIMITS,
    Surroundings,
    data_url,
    file_of,
    pixels_of,
    random_picture,
    replied,
    tiny,
    told,
)
from mmi_deploy.errors import BusyError, EngineError
from mmi_deploy.runtime.events import Event, Finished, Reason, TextDelta
from mmi_deploy.runtime.options import DEFAULTS
from mmi_deploy.runtime.sampling import Sampled
from mmi_deploy.runtime.timings import Timings
from mmi_deploy.server.api import chat
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.endings import FINISH_REASONS
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.settings import RequestLimits

RED = {"model": "tiny", "messages": [{"role": "user", "content": "the red square"}]}


def read(limits: RequestLimits = LIMITS, **more: Any) -> ApiRequest:
    return chat.read({**RED, **more}, tiny(), limits)


def refused(limits: RequestLimits = LIMITS, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(limits, **more)
    return caught.value


def strict(reply: dict[str, Any]) -> ChatCompletion:
    """The reply as the official client reads it with strict validation, from JSON."""
    return ChatCompletion.model_validate_json(json.dumps(reply), strict=True)


# --- requests ---------------------------------------------------------------------------------


def test_defaults_are_those_of_the_runtime() -> None:
    request = read()
    options = request.options
    assert options == DEFAULTS.__class__(seed=options.seed)
    assert (request.stream, request.transport, request.output_format) == (False, "inline", "png")
    assert request.max_seconds == LIMITS.seconds and request.requests == (request,)


def test_options_arrive() -> None:
    request = read(
        seed=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        presence_penalty=-1,
        frequency_penalty=2,
        repetition_penalty=1.5,
        max_completion_tokens=12,
        min_tokens=2,
        stop=["up", "down"],
        logit_bias={"16": -100, "6": 1.5},
        logprobs=True,
        top_logprobs=4,
        mmi={
            "max_images": 3,
            "draw_first": True,
            "turn_tokens": 5,
            "guidance": 2,
            "schedule": "ddim:8",
            "full_every": 2,
            "max_seconds": 3.5,
            "output_format": "webp",
            "output_compression": 80,
            "image_transport": "url",
        },
    )
    found = request.options
    assert (found.seed, found.temperature, found.top_p, found.top_k) == (7, 0, 0.5, 3)
    assert (found.min_p, found.presence_penalty, found.frequency_penalty) == (0.1, -1, 2)
    assert (found.repetition_penalty, found.max_tokens, found.min_tokens) == (1.5, 12, 2)
    assert found.stop == ("up", "down") and found.logprobs == 4
    assert dict(found.logit_bias) == {16: -100, 6: 1.5}
    assert (found.max_images, found.draw_first, found.turn_tokens) == (3, True, 5)
    assert (found.guidance, found.schedule, found.full_every) == (2, "ddim:8", 2)
    assert (request.max_seconds, request.transport) == (3.5, "url")
    assert (request.output_format, request.output_compression) == ("webp", 80)


def test_seeds_are_drawn_when_none_is_given_and_are_exact_in_javascript() -> None:
    seeds = {read().options.seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**53 for seed in seeds)
    assert read(seed=2**64 - 1).options.seed == 2**64 - 1
    assert read(mmi={"seed": 5}).options.seed == read(mmi={"seed": 5}, seed=5).options.seed == 5
    assert refused(seed=1, mmi={"seed": 2}).code == "conflicting_values"


def test_numbers_that_json_schema_calls_whole_are() -> None:
    assert read(seed=7.0, max_tokens=3.0).options.seed == 7
    assert read(seed=2.0**63, top_k=2.0**53).options.top_k == 2**53
    assert read(top_k=-1).options.top_k == 0  # vLLM's word for all


def test_ignore_eos_writes_as_many_tokens_as_were_asked_for() -> None:
    options = read(ignore_eos=True, max_tokens=9).options
    assert (options.min_tokens, options.max_tokens) == (9, 9)
    assert read(ignore_eos=False, max_tokens=9).options.min_tokens == 0


def test_both_names_of_the_tokens_may_come_if_they_agree() -> None:
    assert read(max_tokens=9, max_completion_tokens=9).options.max_tokens == 9
    assert refused(max_tokens=9, max_completion_tokens=8).param == "max_completion_tokens"


def test_modalities() -> None:
    assert read(modalities=["text"]).options.max_images == 0
    assert read(modalities=["image", "text"]).options.max_images == DEFAULTS.max_images
    assert read(modalities=["text", "image"], mmi={"max_images": 1}).options.max_images == 1
    draw = [{"role": "user", "content": [{"type": "text", "text": "red"}, {"type": "mmi.draw"}]}]
    for more in ({"mmi": {"max_images": 1}}, {"mmi": {"draw_first": True}}, {"messages": draw}):
        assert refused(modalities=["text"], **more).code == "conflicting_values"
    assert refused(modalities=["image"]).param == "modalities"
    assert refused(modalities=["audio"]).param == "modalities[0]"


def test_news_of_pictures_need_a_way_to_the_client() -> None:
    request = read(stream=True, mmi={"progress": True, "partial_images": 2})
    assert request.progress and request.previews == 2
    assert refused(mmi={"progress": True}).param == "mmi.progress"
    assert refused(stream=True, mmi={"partial_images": 2}).param == "mmi.partial_images"


def test_stream_options_need_a_stream() -> None:
    assert refused(stream_options={"include_usage": True}).param == "stream_options"
    error = refused(stream=True, stream_options={"continuous_usage_stats": True})
    assert error.param == "stream_options.continuous_usage_stats"
    request = read(
        stream=True, stream_options={"continuous_usage_stats": True, "include_usage": True}
    )
    assert request.include_usage and request.continuous_usage


# What clients send without asking for anything.
NEUTRAL: dict[str, list[Any]] = {
    "n": [1, None, 1.0],
    "best_of": [1],
    "stop": [None, []],
    "logprobs": [False, None],
    "top_logprobs": [0, None],
    "frequency_penalty": [0, 0.0, None],
    "presence_penalty": [0],
    "repetition_penalty": [1.0],
    "tools": [[], None],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none"],
    "parallel_tool_calls": [True, False],
    "store": [False],
    "user": ["somebody"],
    "metadata": [{}, {"a": "b"}],
    "service_tier": ["auto", "default"],
    "response_format": [{"type": "text"}],
    "logit_bias": [{}, None],
    "seed": [None],
    "temperature": [None],
    "top_p": [None],
    "max_tokens": [None],
    "max_completion_tokens": [None],
    "modalities": [None],
    "audio": [None],
    "prediction": [None],
    "reasoning_effort": [None, "none"],
    "verbosity": [None, "medium"],
    "web_search_options": [None],
    "prompt_cache_key": ["k"],
    "prompt_cache_retention": [None],
    "safety_identifier": ["s"],
    "ignore_eos": [False, None],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True],
    "stop_token_ids": [[]],
    "add_generation_prompt": [True],
    "continue_final_message": [False],
    "stream_options": [None],
    "stream": [False, None],
    "mmi": [None, {}],
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_pass(name: str) -> None:
    for value in NEUTRAL[name]:
        assert read(**{name: value}).options.max_tokens == DEFAULTS.max_tokens


# What cannot be honoured, or is wrong, and the field that the error names.
REFUSED: list[tuple[str, Any, str, str]] = [
    ("n", 2, "n", "unsupported_value"),
    ("n", True, "n", "unsupported_value"),
    ("best_of", 3, "best_of", "unsupported_value"),
    ("echo", True, "echo", "unsupported_value"),
    ("tools", [{"type": "function"}], "tools", "unsupported_value"),
    ("tool_choice", "required", "tool_choice", "unsupported_value"),
    ("functions", [{}], "functions", "unsupported_value"),
    ("response_format", {"type": "json_object"}, "response_format", "unsupported_value"),
    ("response_format", {"type": "text", "x": 1}, "response_format", "unsupported_value"),
    ("audio", {"voice": "x", "format": "wav"}, "audio", "unsupported_value"),
    ("store", True, "store", "unsupported_value"),
    ("service_tier", "priority", "service_tier", "unsupported_value"),
    ("reasoning_effort", "high", "reasoning_effort", "unsupported_value"),
    ("prediction", {"type": "content", "content": "x"}, "prediction", "unsupported_value"),
    ("web_search_options", {}, "web_search_options", "unsupported_value"),
    ("stop_token_ids", [1], "stop_token_ids", "unsupported_value"),
    ("skip_special_tokens", False, "skip_special_tokens", "unsupported_value"),
    ("best", 1, "best", "unknown_parameter"),
    ("guided_json", {}, "guided_json", "unknown_parameter"),
    ("temperature", -0.1, "temperature", "invalid_value"),
    ("temperature", float("nan"), "temperature", "invalid_value"),
    ("temperature", float("inf"), "temperature", "invalid_value"),
    ("temperature", 10**400, "temperature", "invalid_type"),
    ("temperature", "1", "temperature", "invalid_type"),
    ("temperature", True, "temperature", "invalid_type"),
    ("temperature", 1e-6, "temperature", "invalid_value"),
    ("top_p", 0, "top_p", "invalid_value"),
    ("top_p", 1.01, "top_p", "invalid_value"),
    ("top_k", -2, "top_k", "invalid_value"),
    ("top_k", 1.5, "top_k", "invalid_type"),
    ("min_p", 2, "min_p", "invalid_value"),
    ("presence_penalty", 2.5, "presence_penalty", "invalid_value"),
    ("seed", -1, "seed", "invalid_value"),
    ("seed", 2**64, "seed", "invalid_value"),
    ("seed", 10**4000, "seed", "invalid_value"),
    ("seed", "7", "seed", "invalid_type"),
    ("seed", 1e300, "seed", "invalid_value"),
    ("seed", float("inf"), "seed", "invalid_type"),
    ("max_tokens", 0, "max_tokens", "invalid_value"),
    ("max_tokens", -5, "max_tokens", "invalid_value"),
    ("max_tokens", 513, "max_tokens", "too_many_tokens"),
    ("max_completion_tokens", 10**30, "max_completion_tokens", "invalid_value"),
    ("min_tokens", 400, "min_tokens", "invalid_value"),
    ("stop", "", "stop", "invalid_value"),
    ("stop", ["a", ""], "stop[1]", "invalid_value"),
    ("stop", ["x"] * 65, "stop", "invalid_value"),
    ("stop", "\ud800", "stop", "invalid_value"),
    ("stop", 3, "stop", "invalid_type"),
    ("logit_bias", {"a": 1}, "logit_bias.a", "invalid_value"),
    ("logit_bias", {"1": 101}, "logit_bias.1", "invalid_value"),
    ("logit_bias", {"1": "1"}, "logit_bias.1", "invalid_type"),
    ("logit_bias", {"112": 1}, "logit_bias", "invalid_value"),
    ("logit_bias", {"-1": 1}, "logit_bias.-1", "invalid_value"),
    ("logprobs", 1, "logprobs", "invalid_type"),
    ("top_logprobs", 3, "top_logprobs", "conflicting_values"),
    ("top_logprobs", 21, "top_logprobs", "invalid_value"),
    ("stream", "true", "stream", "invalid_type"),
    ("stream_options", {"x": 1}, "stream_options.x", "unknown_parameter"),
    ("metadata", {"a": 1}, "metadata.a", "invalid_type"),
    ("model", "gpt", "model", "model_not_found"),
    ("model", None, "model", "invalid_type"),
    ("messages", [], "messages", "invalid_value"),
    ("messages", "hi", "messages", "invalid_type"),
    ("messages", [{"role": "tool", "content": "x"}], "messages[0]", "invalid_value"),
    ("messages", [{"role": "user"}], "messages[0].content", "missing_required_parameter"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content", "invalid_type"),
    ("mmi", {"max_images": -1}, "mmi.max_images", "invalid_value"),
    ("mmi", {"max_images": 50}, "mmi.max_images", "too_many_images"),
    ("mmi", {"guidance": 101}, "mmi.guidance", "invalid_value"),
    ("mmi", {"guidance": float("nan")}, "mmi.guidance", "invalid_value"),
    ("mmi", {"full_every": 0}, "mmi.full_every", "invalid_value"),
    ("mmi", {"schedule": "euler:9"}, "mmi.schedule", "unknown_sampler"),
    ("mmi", {"max_seconds": 601}, "mmi.max_seconds", "too_many_seconds"),
    ("mmi", {"max_seconds": 0}, "mmi.max_seconds", "invalid_value"),
    ("mmi", {"image_transport": "pigeon"}, "mmi.image_transport", "invalid_value"),
    ("mmi", {"partial_images": 4}, "mmi.partial_images", "invalid_value"),
    ("mmi", {"output_compression": 50}, "mmi.output_compression", "conflicting_values"),
    ("mmi", {"colour": 1}, "mmi.colour", "unknown_parameter"),
    ("mmi", {"": 1}, "mmi.", "unknown_parameter"),
    ("", 1, "", "unknown_parameter"),
    ("mmi", 3, "mmi", "invalid_type"),
]


@pytest.mark.parametrize(("name", "value", "param", "code"), REFUSED)
def test_refusals_name_their_field(name: str, value: Any, param: str, code: str) -> None:
    error = refused(**{name: value})
    assert (error.param, error.code) == (param, code)
    assert "None" not in error.message and "after validation" not in error.message
    assert error.status == (404 if code == "model_not_found" else 400)
    assert error.body()["error"]["type"] == "invalid_request_error"
    assert error.headers() == {"x-should-retry": "false"}


def test_limits_of_tokens_images_and_seconds() -> None:
    limits = RequestLimits(tokens=10, images=2, seconds=5)
    request = read(limits)
    assert (request.options.max_tokens, request.options.max_images) == (10, 2)
    assert request.max_seconds == 5
    assert read(limits, max_tokens=10).options.max_tokens == 10
    assert refused(limits, max_tokens=11).code == "too_many_tokens"
    assert refused(limits, mmi={"max_images": 3}).code == "too_many_images"
    assert refused(limits, mmi={"max_seconds": 5.1}).code == "too_many_seconds"


def test_bodies_of_benchmarks_are_read() -> None:
    """As vLLM, GuideLLM, AIPerf and SGLang send them."""
    url = data_url(file_of(random_picture(3), "JPEG"), "image/jpeg")
    content = [
        {"type": "text", "text": "red"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    usage = {"include_usage": True}
    bodies: list[dict[str, Any]] = [
        {"max_completion_tokens": 8, "stream_options": usage, "ignore_eos": True},
        {
            "max_completion_tokens": 8,
            "max_tokens": 8,
            "ignore_eos": True,
            "stop": None,
            "stream_options": {**usage, "continuous_usage_stats": True},
        },
        {
            "messages": [{"role": "user", "name": "", "content": content}],
            "max_completion_tokens": 8,
            "min_tokens": 8,
            "ignore_eos": True,
            "stream_options": usage,
        },
        {"temperature": 0, "max_completion_tokens": 8, "ignore_eos": True},
    ]
    for body in bodies:
        request = read(stream=True, **body)
        assert request.options.min_tokens == request.options.max_tokens == 8


def test_given_and_drawn_pictures_share_one_limit() -> None:
    url = data_url(file_of(random_picture(3)))
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "mmi.draw"}] * 2
    given = {"messages": [{"role": "user", "content": content}]}
    for most, left in ((4, 0), (6, 2), (20, DEFAULTS.max_images)):
        assert read(RequestLimits(images=most), **given).options.max_images == left
    assert read(RequestLimits(images=6), **given, mmi={"max_images": 2}).options.max_images == 2
    assert refused(RequestLimits(images=6), **given, mmi={"max_images": 3}).code == (
        "too_many_images"
    )


def test_every_parameter_of_the_official_client_is_known() -> None:
    hints = get_type_hints(completion_create_params.CompletionCreateParamsStreaming)
    known = chat.REQUEST_SCHEMA["properties"]
    assert not set(hints) - set(known)


def test_the_schema_stands_alone_and_its_examples_are_read() -> None:
    text = json.dumps(chat.REQUEST_SCHEMA)
    assert "$ref" not in text and "$defs" not in text
    for example in chat.REQUEST_SCHEMA["examples"]:
        assert chat.read(example, tiny(), LIMITS).options.seed == example["seed"]


# --- replies ----------------------------------------------------------------------------------


def test_a_reply_of_text_and_pictures() -> None:
    one, two = random_picture(1), random_picture(2)
    url = data_url(file_of(random_picture(3)))
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "the red square moves down."},
        {"type": "mmi.draw"},
    ]
    request = read(messages=[{"role": "user", "content": content}], seed=7)
    events = told([one, "the red square", " turns blue.", two], "max_images", given=1)
    reply = replied(chat, request, events, Surroundings(cached=20).context)
    found = strict(reply)
    choice = found.choices[0]
    assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
    assert choice.message.content == "the red square turns blue." and choice.logprobs is None
    images = reply["choices"][0]["message"]["images"]
    assert [(one["index"], one["mmi"]["offset"]) for one in images] == [(0, 0), (1, 26)]
    assert images[0]["mmi"] == {"offset": 0, "seed": 7, "steps": 20}
    for image, rgb in zip(images, (one, two), strict=True):
        assert np.array_equal(pixels_of(image["image_url"]["url"]), rgb)
    assert found.id == "chatcmpl-abc" and found.object == "chat.completion"
    assert (found.created, found.model, found.system_fingerprint) == (
        1_795_905_000,
        "tiny",
        "mmi-1a2b",
    )
    assert reply["mmi"]["reason"] == "max_images" and reply["mmi"]["seed"] == 7
    assert reply["mmi"]["stage_seconds"] == {"prefill": 0.5, "decode": 0.5}
    assert (reply["mmi"]["queue_seconds"], reply["mmi"]["cached_tokens"]) == (0.25, 20)
    # Six words and `<s>`; one given and two drawn pictures of 16 visual tokens and one token each.
    assert reply["usage"] == {
        "prompt_tokens": 24,
        "completion_tokens": 36,
        "total_tokens": 60,
        "prompt_tokens_details": {"cached_tokens": 20, "text_tokens": 7, "image_tokens": 17},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "text_tokens": 2,
            "image_tokens": 34,
        },
    }


def test_cached_tokens_are_never_more_than_the_prompt() -> None:
    """Tokens of pictures that the request asks for are in the document, not in the prompt."""
    reply = replied(chat, read(), told(["up"]), Surroundings(cached=400).context)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


def test_a_reply_without_text_has_an_empty_string() -> None:
    reply = replied(chat, read(), told([random_picture(1)]), Surroundings().context)
    assert strict(reply).choices[0].message.content == ""
    empty = replied(chat, read(), told([]), Surroundings().context)
    assert strict(empty).choices[0].message.content == ""
    assert empty["choices"][0]["message"]["images"] == []


@pytest.mark.parametrize(
    ("transport", "format", "quality", "mime"),
    [
        ("inline", "png", None, "image/png"),
        ("chunked", "webp", 50, "image/webp"),
        ("inline", "jpeg", 90, "image/jpeg"),
    ],
)
def test_formats_and_transports(
    transport: str, format: str, quality: int | None, mime: str
) -> None:
    mmi = {"image_transport": transport, "output_format": format, "output_compression": quality}
    reply = replied(chat, read(mmi=mmi), told([random_picture(1)]), Surroundings().context)
    url = reply["choices"][0]["message"]["images"][0]["image_url"]["url"]
    options = {} if quality is None else {"quality": quality}
    assert url == data_url(file_of(random_picture(1), format.upper(), **options), mime)


def test_pictures_by_url_are_kept_by_the_server() -> None:
    around = Surroundings()
    events = told(["a", random_picture(1), random_picture(2)])
    reply = replied(chat, read(mmi={"image_transport": "url"}), events, around.context)
    images = reply["choices"][0]["message"]["images"]
    assert [one["image_url"]["url"] for one in images] == [
        "/v1/mmi/images/0",
        "/v1/mmi/images/1",
    ]
    assert around.stored[1] == (file_of(random_picture(2)), "image/png")


@pytest.mark.parametrize("reason", ["end", "stop", "max_images", "max_tokens", "context"])
def test_reasons(reason: Reason) -> None:
    reply = replied(chat, read(), told(["up"], reason), Surroundings().context)
    expected = "length" if reason in ("max_tokens", "context") else "stop"
    assert strict(reply).choices[0].finish_reason == expected == FINISH_REASONS[reason]
    assert reply["mmi"]["reason"] == reason


@pytest.mark.parametrize(
    ("events", "status", "code"),
    [
        (told(["up"], "deadline"), 504, "deadline"),
        (told(["up"], "cancelled"), 503, "cancelled"),
        ([TextDelta("up")], 503, "engine_died"),
        ([], 503, "engine_died"),
        ([ApiError(503, "draining", "the server ends")], 503, "draining"),
    ],
)
def test_endings_that_are_errors(events: list[Event | Exception], status: int, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        replied(chat, read(), events, Surroundings().context)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.headers() == {"x-should-retry": "false"}


def test_errors_of_the_engine_are_raised_as_they_are() -> None:
    for error in (EngineError("broken"), BusyError("full")):
        with pytest.raises(type(error)):
            replied(chat, read(), [TextDelta("up"), error], Surroundings().context)


def test_log_probabilities() -> None:
    """Tokens with the space in front of words; special ones by name; minus infinity as OpenAI's."""
    ids = tiny().tokenizer.encode("red square.")
    down = float("-inf")
    sampled = (
        Sampled(ids[0], -0.5, ((ids[0], -0.5), (2, -1.25))),
        Sampled(ids[2], -1.5, ((ids[1], -1.0), (ids[2], down))),
    )
    end = Finished("end", 2, 0, Timings())
    events = [TextDelta("red.", sampled, 2), end]
    reply = replied(chat, read(logprobs=True, top_logprobs=2), events, Surroundings().context)
    found = strict(reply).choices[0].logprobs
    assert found is not None and found.content is not None and found.refusal is None
    assert [(one.token, one.logprob) for one in found.content] == [(" red", -0.5), (".", -1.5)]
    assert [[(two.token, two.logprob) for two in one.top_logprobs] for one in found.content] == [
        [(" red", -0.5), ("</s>", -1.25)],
        [(" square", -1.0), (".", -9999.0)],
    ]
    assert found.content[0].bytes == list(b" red")
    assert replied(chat, read(), events, Surroundings().context)["choices"][0]["logprobs"] is None
