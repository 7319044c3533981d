"""`/v1/completions`: text in, text out, the natural form for a model that continues text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mmi_deploy.runtime.events import Event, Finished, TextDelta
from mmi_deploy.server.api import sse
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.document_parts import DocumentBuilder, ReadDocument
from mmi_deploy.server.api.endings import details, ended_early, finish_reason, usage_of
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.fields import (
    BeamFields,
    Count,
    MmiFields,
    ModelName,
    Seed,
    check_model,
    max_seconds_of,
    only,
    read_fields,
)
from mmi_deploy.server.api.pictures import Fetch
from mmi_deploy.server.api.reply_context import ReplyContext
from mmi_deploy.server.api.sampling_fields import SamplingFields, sampling_options
from mmi_deploy.server.api.schemas import schema_of
from mmi_deploy.server.api.token_ids import TokenIds, check_token_ids
from mmi_deploy.server.api.usage import Usage
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import RequestLimits

# Tokens that OpenAI's endpoint writes unless told.
DEFAULT_TOKENS = 16


class TextMmiFields(BeamFields):
    """Extensions that concern text."""

    seed: Seed | None = Field(None, description="Of all random draws; drawn and returned if none.")
    min_tokens: Count | None = Field(None, description="Tokens before the model may end the text.")
    max_seconds: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Time after which the request is ended with the error `deadline`."
    )


def _one_prompt(value: object) -> object:
    """Refuse several prompts in one body, which would get several replies."""
    if isinstance(value, list) and len(value) > 1 and isinstance(value[0], str | list):
        raise PydanticCustomError("several_prompts", "should be one prompt, not several")
    return value


class CompletionBody(SamplingFields):
    """A request of a completion."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "tiny", "prompt": "the red square", "max_tokens": 16, "temperature": 0}
            ]
        }
    )

    model: ModelName
    prompt: Annotated[
        str
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=1)],
        BeforeValidator(_one_prompt),
    ] = Field(
        description="A text, or token ids as `/tokenize` gives them; a list of one such prompt."
    )
    max_tokens: Count | None = Field(
        None, description=f"Tokens to write; {DEFAULT_TOKENS} unless given."
    )
    mmi: TextMmiFields | None = Field(None, description="Extensions of this server.")

    logprobs: only() = None  # type: ignore[valid-type]
    suffix: only("") = None  # type: ignore[valid-type]
    prompt_logprobs: only() = None  # type: ignore[valid-type]
    add_special_tokens: only(True) = None  # type: ignore[valid-type]


REQUEST_SCHEMA = schema_of(CompletionBody)


def read(
    body: Mapping[str, Any],
    model: ServedModel,
    limits: RequestLimits,
    fetch: Fetch | None = None,
) -> ApiRequest:
    """Read a body; raises `ApiError`. fetch: as on the other endpoints; there are no pictures."""
    fields = read_fields(CompletionBody, body)
    check_model(fields.model, model)
    stream = fields.stream_fields()
    given = fields.mmi or TextMmiFields()
    mmi = MmiFields(**given.model_dump())
    tokens = DEFAULT_TOKENS if fields.max_tokens is None else fields.max_tokens
    if fields.max_tokens is None and limits.tokens is not None:
        tokens = min(tokens, limits.tokens)
    options = sampling_options(
        fields, mmi, model, limits, {"max_tokens": tokens, "max_images": 0}, {}
    )
    seconds = max_seconds_of(mmi, limits)
    read = _document(fields, model, limits)
    return ApiRequest(
        document=read.document,
        options=options,
        prompt_usage=read.usage,
        max_seconds=seconds,
        **stream,
    )


def _document(fields: CompletionBody, model: ServedModel, limits: RequestLimits) -> ReadDocument:
    """The document of a prompt, which must have the tokens that were sent, if any were."""
    builder, prompt = DocumentBuilder(model, limits), fields.prompt
    one: object = prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        one = prompt[0]
    if isinstance(one, str):
        builder.text(one, "prompt")
        return builder.build()
    assert isinstance(one, list)
    ids: tuple[int, ...] = tuple(one)
    check_token_ids(ids, model, "prompt")
    begin = model.config.tokens.bos
    if ids[:1] == (begin,):
        ids = ids[1:]
    builder.text(model.tokenizer.decode(ids), "prompt")
    read = builder.build()
    if read.token_ids != (begin, *ids):
        raise ApiError(
            400,
            "inexact_tokens",
            "the token ids of `prompt` are not those that the tokenizer gives for their text, "
            "which the model would read; send the text",
            param="prompt",
        )
    return read


async def reply(
    request: ApiRequest, events: AsyncIterator[Event], context: ReplyContext
) -> dict[str, Any]:
    """The whole reply, at the end of the events. Raises what they raise, and `ApiError`."""
    text, finished = "", None
    async for event in events:
        match event:
            case TextDelta():
                text += event.text
            case Finished():
                finished = event
    if finished is None:
        raise ended_early()
    reason, stats = finish_reason(finished.reason, request), context.stats()
    return {
        **_head(context),
        "choices": [_choice(text, reason)],
        "usage": usage_of(request, finished, stats, context.model.config).chat(),
        "mmi": details(request, finished, stats),
    }


def stream(
    request: ApiRequest, events: AsyncIterator[Event], context: ReplyContext
) -> AsyncIterator[bytes]:
    """The reply as events, one an item.

    An error before the first item is raised: the status line can still tell it. A later one is
    the last event.
    """
    return sse.with_failure(_chunks(request, events, context), sse.error)


def failure(request: ApiRequest, failed: ApiError, context: ReplyContext) -> bytes:
    """The rest of a stream in which nothing but keep-alives was sent when the request failed."""
    return sse.error(failed)


def KEEP_ALIVE(request: ApiRequest, context: ReplyContext) -> bytes:
    """A chunk that says nothing, as a comment alone breaks some clients."""
    return sse.data({**_head(context), "choices": []})


async def _chunks(
    request: ApiRequest, events: AsyncIterator[Event], context: ReplyContext
) -> AsyncGenerator[bytes]:
    head, usage = _head(context), Usage(request.prompt_usage)

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        so_far = {"usage": usage.chat()} if request.continuous_usage else {}
        return sse.data({**head, "choices": choices, **so_far, **more})

    finished = None
    async for event in events:  # to their end: the statistics are known then
        match event:
            case TextDelta():
                usage = Usage(request.prompt_usage, max(usage.text, event.tokens))
                yield chunk([_choice(event.text, None)])
            case Finished():
                finished = event
    if finished is None:
        raise ended_early()
    reason, stats = finish_reason(finished.reason, request), context.stats()
    usage = usage_of(request, finished, stats, context.model.config)
    yield chunk([_choice("", reason)], mmi=details(request, finished, stats))
    if request.include_usage:
        yield sse.data({**head, "choices": [], "usage": usage.chat()})
    yield sse.DONE


def _head(context: ReplyContext) -> dict[str, Any]:
    """Fields that begin every object of a reply."""
    return {
        "id": f"cmpl-{context.request_id}",
        "object": "text_completion",
        "created": context.created,
        "model": context.model.name,
        "system_fingerprint": context.model.fingerprint,
    }


def _choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
