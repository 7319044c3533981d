"""`/v1/models`, `/tokenize` and `/detokenize`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Model

from deploy.server.api.served import LIMITS, data_url, file_of, random_picture, tiny
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.models import get_model, list_models
from mmi_deploy.server.api.tokens import (
    DETOKENIZE_SCHEMA,
    TOKENIZE_SCHEMA,
    detokenize,
    tokenize,
)
from mmi_deploy.server.settings import RequestLimits


def test_the_model_tells_its_limits_samplers_sizes_and_exactness() -> None:
    found = list_models(tiny(), RequestLimits(images=4, tokens=10_000))
    assert found["object"] == "list"
    (model,) = found["data"]
    Model.model_validate_json(json.dumps(model), strict=True)
    assert (model["id"], model["root"], model["max_model_len"]) == ("tiny", "tiny", 512)
    mine = model["mmi"]
    assert mine["limits"] == {
        "body_bytes": 64 * 2**20,
        "parts": 1024,
        "text_bytes": 2**20,
        "image_bytes": 20 * 2**20,
        "image_pixels": 64_000_000,
        "all_pixels": 256_000_000,
        "images": 4,
        "tokens": 512,
        "seconds": 600.0,
    }
    assert mine["samplers"] == {"unipc:20": 20, "ddim:8": 8}
    assert mine["defaults"]["schedule"] == "unipc:20"
    assert (mine["sizes"], mine["picture_tokens"]) == (["64x64"], 17)
    assert mine["exactness"] == "bit-equal"
    assert get_model("tiny", tiny(), LIMITS, exactness="receipt")["mmi"]["exactness"] == "receipt"


def test_another_model_is_not_found_and_its_name_not_repeated() -> None:
    with pytest.raises(ApiError) as caught:
        get_model("x" * 1000, tiny(), LIMITS)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert "xx" not in caught.value.message


def ids(**body: Any) -> dict[str, Any]:
    return tokenize(body, tiny(), LIMITS)


def test_texts_as_they_stand() -> None:
    found = ids(prompt="the red square")
    assert found == {
        "count": 4,
        "max_model_len": 512,
        "tokens": [1, *tiny().tokenizer.encode("the red square")],
        "token_strs": None,
    }
    assert ids(prompt="the red", add_special_tokens=False)["count"] == 2
    assert ids(prompt="")["tokens"] == [1]
    assert ids(prompt="red " * 600)["count"] == 601
    spelled = ids(prompt="the red.", return_token_strs=True, model="tiny")["token_strs"]
    assert spelled == ["<s>", " the", " red", "."]


def test_chats_with_pictures() -> None:
    url = data_url(file_of(random_picture(1)))
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "red"},
    ]
    found = ids(messages=[{"role": "user", "content": content}])
    assert found["tokens"] == [1, 3, *[4] * 16, *tiny().tokenizer.encode("red")]
    assert found["count"] == 19


def test_tokens_to_text() -> None:
    body = {"tokens": [1, *tiny().tokenizer.encode("the red square moves down."), 2]}
    assert detokenize(body, tiny(), LIMITS) == {"prompt": "the red square moves down."}
    assert detokenize({"tokens": []}, tiny(), LIMITS) == {"prompt": ""}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "red", "messages": [{"role": "user", "content": "red"}]}, "prompt"),
        ({"prompt": "frobnicate"}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "red" * 400_000}, "prompt"),
        ({"messages": []}, "messages"),
        ({"prompt": "red", "chat_template": "x"}, "chat_template"),
    ],
)
def test_refusals_of_texts(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        tokenize(body, tiny(), LIMITS)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    "tokens", [None, "x", [-1], [112], [1.5], [2**63], [True], ["1"], [1] * (2**17 + 1)]
)
def test_refusals_of_tokens(tokens: Any) -> None:
    with pytest.raises(ApiError) as caught:
        detokenize({"tokens": tokens}, tiny(), LIMITS)
    assert caught.value.status == 400 and str(caught.value.param).startswith("tokens")


def test_schemas_stand_alone() -> None:
    for schema in (TOKENIZE_SCHEMA, DETOKENIZE_SCHEMA):
        assert "$ref" not in json.dumps(schema) and schema["additionalProperties"] is False
