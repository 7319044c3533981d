"""`/tokenize` and `/detokenize`, as vLLM has them: tokens of texts and chats, texts of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field

from mmi_deploy.errors import DocumentError
from mmi_deploy.server.api.document_parts import (
    DocumentBuilder,
    Message,
    add_messages,
    check_part_count,
)
from mmi_deploy.server.api.errors import ApiError, api_error_of
from mmi_deploy.server.api.fields import Fields, String, check_limit, check_model, only, read_fields
from mmi_deploy.server.api.pictures import Fetch
from mmi_deploy.server.api.schemas import schema_of
from mmi_deploy.server.api.token_ids import TokenIds, check_token_ids
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import RequestLimits


class TokenizeBody(Fields):
    """A text, or the messages of a chat with its pictures."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "tiny", "prompt": "the red square"}]}
    )

    model: str | None = None
    prompt: String | None = Field(None, description="A text; this or `messages`.")
    messages: list[Message] | None = Field(
        None, min_length=1, description="As of a chat; pictures count their visual tokens."
    )
    add_special_tokens: bool | None = Field(
        None, description="Begin with the token of the beginning, which every document has."
    )
    return_token_strs: bool | None = Field(None, description="Return the tokens' spellings too.")
    add_generation_prompt: only(True, False) = None  # type: ignore[valid-type]
    continue_final_message: only(True, False) = None  # type: ignore[valid-type]
    chat_template: only() = None  # type: ignore[valid-type]
    chat_template_kwargs: only({}) = None  # type: ignore[valid-type]
    tools: only([]) = None  # type: ignore[valid-type]


class DetokenizeBody(Fields):
    """Token ids."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "tiny", "tokens": [16, 45, 39]}]}
    )

    model: str | None = None
    tokens: TokenIds


TOKENIZE_SCHEMA = schema_of(TokenizeBody)
DETOKENIZE_SCHEMA = schema_of(DetokenizeBody)


def tokenize(
    body: Mapping[str, Any],
    model: ServedModel,
    limits: RequestLimits,
    fetch: Fetch | None = None,
) -> dict[str, Any]:
    """Tokens of a text as it stands, or of a chat as the model reads it. Raises `ApiError`.

    A text alone may be longer than the model's context: its count tells.
    """
    check_part_count(body, "messages", limits)
    fields = read_fields(TokenizeBody, body)
    if fields.model is not None:
        check_model(fields.model, model)
    if (fields.prompt is None) == (fields.messages is None):
        raise ApiError(
            400,
            "missing_required_parameter",
            "send `prompt` or `messages`, and not both",
            param="prompt",
        )
    if fields.prompt is not None:
        ids = _of_text(fields.prompt, model, limits)
    else:
        builder = DocumentBuilder(model, limits, fetch)
        add_messages(builder, fields.messages or ())
        ids = list(builder.build().token_ids)[1:]
    if fields.add_special_tokens is not False:
        ids = [model.config.tokens.bos, *ids]
    found: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": model.limits.context,
        "tokens": ids,
    }
    spellings = [model.tokenizer.spelling(one) for one in ids] if fields.return_token_strs else None
    return {**found, "token_strs": spellings}


def _of_text(text: str, model: ServedModel, limits: RequestLimits) -> list[int]:
    check_limit("bytes of text", "text_too_long", len(text.encode()), limits.text_bytes, "prompt")
    try:
        return model.tokenizer.encode(text)
    except DocumentError as error:
        raise api_error_of(error, param="prompt") from None


def detokenize(
    body: Mapping[str, Any], model: ServedModel, limits: RequestLimits
) -> dict[str, Any]:
    """The text of tokens, without special ones. Raises `ApiError`."""
    fields = read_fields(DetokenizeBody, body)
    if fields.model is not None:
        check_model(fields.model, model)
    check_token_ids(fields.tokens, model, "tokens")
    return {"prompt": model.tokenizer.decode(fields.tokens)}
