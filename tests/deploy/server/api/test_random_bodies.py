"""Bodies of any kind give a request or an `ApiError`, and never another exception.

Bodies are made from right ones by random changes, as a schema alone would seldom reach the checks
behind it; and from the schemas themselves.
"""

from __future__ import annotations

import copy
import json
import random
import re
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.server.api.served import LIMITS, data_url, file_of, random_picture, tiny
from mmi_deploy.server.api import chat, completions, image_generations, responses, tokens
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.errors import ApiError

URL = data_url(file_of(random_picture(1, 9, 9)))
PAYLOAD = URL[60:100]
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")
PATH = re.compile(r"(?<![\w.])/(?!v1/)\w+")

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "the "},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
                {"type": "text", "text": "red square"},
                {"type": "mmi.draw"},
            ],
        },
        {
            "role": "assistant",
            "content": "moves down",
            "images": [{"index": 0, "type": "image_url", "image_url": {"url": URL}}],
        },
    ],
    "stream": True,
    "stream_options": {"include_usage": True},
    "modalities": ["text", "image"],
    "seed": 7,
    "temperature": 1,
    "top_p": 0.5,
    "max_completion_tokens": 9,
    "stop": ["up"],
    "logit_bias": {"16": 3},
    "logprobs": True,
    "top_logprobs": 2,
    "metadata": {"a": "b"},
    "mmi": {"max_images": 1, "guidance": 2, "schedule": "ddim:8", "progress": True},
}
TEXT: dict[str, Any] = {
    "model": "tiny",
    "prompt": [16, 45, 39],
    "max_tokens": 3,
    "stream": True,
    "stop": "up",
    "mmi": {"seed": 3},
}
RESPONSE: dict[str, Any] = {
    "model": "tiny",
    "input": [
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": URL, "detail": "auto"},
                {"type": "input_text", "text": "the red"},
                {"type": "mmi.draw"},
            ],
        },
        {
            "type": "image_generation_call",
            "id": "ig_0",
            "status": "completed",
            "result": URL[22:],
            "size": "64x64",
            "revised_prompt": None,
            "mmi": {"place": 0, "seed": 7, "steps": 20},
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "square", "annotations": [], "logprobs": []}
            ],
        },
        {"role": "system", "content": "the "},
    ],
    "instructions": "red ",
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [{"type": "image_generation", "partial_images": 2, "size": "auto"}],
    "tool_choice": {"type": "image_generation"},
    "text": {"format": {"type": "text"}},
    "metadata": {"a": "b"},
    "max_output_tokens": 9,
    "store": False,
    "mmi": {"seed": 7, "max_images": 1, "image_transport": "url"},
}
PICTURES: dict[str, Any] = {
    "model": "tiny",
    "prompt": "the red square",
    "n": 2,
    "size": "64x64",
    "response_format": "b64_json",
    "output_format": "webp",
    "output_compression": 80,
    "stream": True,
    "partial_images": 2,
    "mmi": {"seed": 7, "guidance": 2},
}
TOKENS: dict[str, Any] = {"model": "tiny", "tokens": [16, 45]}

ENDPOINTS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "chat": (chat.read, CHAT, chat.REQUEST_SCHEMA),
    "completions": (completions.read, TEXT, completions.REQUEST_SCHEMA),
    "responses": (responses.read, RESPONSE, responses.REQUEST_SCHEMA),
    "images": (image_generations.read, PICTURES, image_generations.REQUEST_SCHEMA),
    "tokenize": (
        tokens.tokenize,
        {"model": "tiny", "messages": CHAT["messages"]},
        tokens.TOKENIZE_SCHEMA,
    ),
    "detokenize": (tokens.detokenize, TOKENS, tokens.DETOKENIZE_SCHEMA),
}

MANY = 200_000

STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    1.0,
    0.5,
    2**64,
    10**400,
    -(10**30),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "\ud800",
    "\x00",
    "/etc/passwd",
    "0x7f00deadbeef",
    "http://127.0.0.1/x",
    "file:///etc/shadow",
    URL,
    URL[:-7],
    URL.replace("A", "-"),
    "data:image/png;base64,",
    [],
    {},
    [[]],
    [None],
    {"type": "text"},
    {"type": "image_url", "image_url": {"url": URL}},
    {"\ud800": 1},
    {"type": ["text"]},
]


def check(call: Callable[..., Any], body: Any) -> ApiRequest | dict[str, Any] | None:
    """Read a body; None for an `ApiError`, which must be fit to be sent."""
    try:
        found: ApiRequest | dict[str, Any] = call(body, tiny(), LIMITS)
    except ApiError as error:
        sent = json.dumps(error.body())
        assert error.status in (400, 404) and error.message and len(error.message) <= 700
        assert not ADDRESS.search(sent) and not PATH.search(error.message), error.message
        assert PAYLOAD not in sent and "\n" not in error.message
        assert error.param is None or len(error.param) < 300
        return None
    return found


def change(rng: random.Random, value: Any) -> Any:
    """The value with one thing in it replaced, removed, added or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        value, key = dict(value), rng.choice([*value])
        match rng.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[rng.choice(["x", "\ud800", "0" * 300, "type", "n", "\n"])] = rng.choice(
                    STRANGE
                )
            case 2:
                value[key] = rng.choice(STRANGE)
            case _:
                value[key] = change(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        value, place = list(value), rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                del value[place]
            case 1:
                value.insert(place, rng.choice(STRANGE))
            case 2:
                value *= rng.choice([2, 60])
            case _:
                value[place] = change(rng, value[place])
        return value
    return rng.choice(STRANGE)


@pytest.mark.parametrize("name", ENDPOINTS)
def test_changed_bodies(name: str) -> None:
    call, right, _ = ENDPOINTS[name]
    rng, found = random.Random(name), 0
    assert check(call, right) is not None
    for _ in range(2500):
        body = copy.deepcopy(right)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            body = change(rng, body)
        found += check(call, body) is not None
    assert found > 25, "some changes leave a body right"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ENDPOINTS)
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_json_in_any_field(name: str, data: st.DataObject) -> None:
    call, right, schema = ENDPOINTS[name]
    field = data.draw(st.sampled_from(sorted(schema["properties"])))
    check(call, {**right, field: data.draw(JSON)})
    check(call, data.draw(JSON))


@pytest.mark.parametrize("name", ENDPOINTS)
def test_schemas_agree_with_reading(name: str) -> None:
    """Bodies that a schema forbids are refused; those it allows, for reasons beyond types alone."""
    call, right, schema = ENDPOINTS[name]
    validator, rng = jsonschema_rs.Draft202012Validator(schema), random.Random(name)
    beyond = {
        "conflicting_values",
        "context_length_exceeded",
        "image_too_large",
        "inexact_tokens",
        "invalid_base64",
        "invalid_document",
        "invalid_image",
        "invalid_image_url",
        "missing_required_parameter",
        "model_not_found",
        "remote_images_off",
        "too_many_images",
        "too_many_parts",
        "too_many_tokens",
        "text_too_long",
        "unknown_sampler",
        "unsupported_value",
    }
    counts = {True: 0, False: 0}
    for _ in range(1200):
        body = change(rng, copy.deepcopy(right))
        if any(bad in repr(body) for bad in ("nan", "inf", "\\ud800")):
            continue  # no JSON that can be sent
        valid = validator.is_valid(body)
        counts[valid] += 1
        try:
            call(body, tiny(), LIMITS)
        except ApiError as error:
            if valid:
                assert error.code in beyond or error.code == "invalid_value", (error.code, body)
        else:
            assert valid, body
    assert min(counts.values()) > 20, counts


@pytest.mark.parametrize(
    ("call", "body"),
    [
        (completions.read, {**TEXT, "prompt": [-1] * MANY}),
        (completions.read, {**TEXT, "prompt": [[[]]] * MANY}),
        (completions.read, {**TEXT, "stop": [3] * MANY}),
        (chat.read, {**CHAT, **{f"x{number}": 1 for number in range(MANY)}}),
        (chat.read, {**CHAT, "metadata": {f"x{number}": 1 for number in range(MANY)}}),
        (chat.read, {**CHAT, "logit_bias": {f"x{number}": 1 for number in range(MANY)}}),
        (chat.read, {**CHAT, "messages": [{}] * MANY}),
        (chat.read, {**CHAT, "messages": [{"role": "user", "content": [{}] * MANY}]}),
        (chat.read, {**CHAT, "mmi": {f"x{number}": 1 for number in range(MANY)}}),
        (
            chat.read,
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * MANY}],
            },
        ),
        (tokens.detokenize, {"tokens": ["x"] * MANY}),
        (responses.read, {**RESPONSE, "input": [{}] * MANY}),
        (responses.read, {**RESPONSE, "input": [{"role": "user", "content": [{}] * MANY}]}),
        (responses.read, {**RESPONSE, "tools": [{}] * MANY}),
        (responses.read, {**RESPONSE, "metadata": {f"x{number}": 1 for number in range(MANY)}}),
        (image_generations.read, {**PICTURES, **{f"x{number}": 1 for number in range(MANY)}}),
    ],
    ids=[str(number) for number in range(16)],
)
def test_many_errors_cost_no_more_than_one(call: Callable[..., Any], body: dict[str, Any]) -> None:
    start = time.thread_time()
    assert check(call, body) is None
    assert time.thread_time() - start < 0.5
    tracemalloc.start()
    check(call, body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 2**20
