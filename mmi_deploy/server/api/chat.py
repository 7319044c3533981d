"""`/v1/chat/completions`: text and pictures of one document as a message of the assistant.

`content` stays a string, as clients expect. Pictures are in `images`, each with a running `index`,
and `mmi.offset`: the number of code points of `content` before it. Joined at their offsets, they
are the document that the model wrote.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from mmi_deploy.runtime.events import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from mmi_deploy.runtime.sampling import Sampled
from mmi_deploy.server.api import sse
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.document_parts import (
    DocumentBuilder,
    DrawPart,
    Message,
    add_messages,
    check_part_count,
)
from mmi_deploy.server.api.endings import details, ended_early, finish_reason, usage_of
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.fields import (
    NO_EXTENSIONS,
    Label,
    Metadata,
    MmiFields,
    ModelName,
    Positive,
    Whole,
    agreed,
    check_model,
    max_seconds_of,
    only,
    read_fields,
    reply_fields,
    with_room,
)
from mmi_deploy.server.api.picture_urls import chunked, encoded, picture_url
from mmi_deploy.server.api.pictures import Fetch
from mmi_deploy.server.api.reply_context import ReplyContext
from mmi_deploy.server.api.sampling_fields import SamplingFields, sampling_options
from mmi_deploy.server.api.schemas import schema_of
from mmi_deploy.server.api.usage import Usage, picture_tokens
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import RequestLimits

# What OpenAI sends for a probability of 0.
_NO_LOGPROB = -9999.0


class ChatBody(SamplingFields):
    """A request of a chat completion."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "tiny",
                    "messages": [
                        {
                            "role": "user",
                            "content": [
                                {"type": "text", "text": "the red square moves down."},
                                {"type": "mmi.draw"},
                            ],
                        }
                    ],
                    "max_completion_tokens": 16,
                    "seed": 7,
                    "mmi": {"max_images": 1},
                }
            ]
        }
    )

    model: ModelName
    messages: list[Message] = Field(
        min_length=1,
        description="Joined in order, nothing is inserted; system and developer messages first.",
    )
    modalities: list[Literal["text", "image"]] | None = Field(
        None,
        min_length=1,
        description='`["text"]` for no pictures. With `image`, as without this field, the model '
        "draws where it wants to.",
    )
    max_completion_tokens: Positive | None = Field(
        None, description="Text tokens to write; 256 unless given. Pictures do not count."
    )
    max_tokens: Positive | None = Field(None, description="The older name of the same.")
    logprobs: bool | None = Field(None, description="Return log probabilities of the tokens.")
    top_logprobs: Whole | None = Field(
        None, ge=0, le=20, description="Most probable tokens at each place; needs `logprobs`."
    )
    mmi: MmiFields | None = Field(None, description="Extensions of this server.")

    audio: only() = None  # type: ignore[valid-type]
    add_generation_prompt: only(True, False) = None  # type: ignore[valid-type]
    chat_template: only() = None  # type: ignore[valid-type]
    chat_template_kwargs: only({}) = None  # type: ignore[valid-type]
    continue_final_message: only(True, False) = None  # type: ignore[valid-type]
    function_call: only("none") = None  # type: ignore[valid-type]
    functions: only([]) = None  # type: ignore[valid-type]
    metadata: Metadata = None
    moderation: only() = None  # type: ignore[valid-type]
    parallel_tool_calls: only(True, False) = None  # type: ignore[valid-type]
    prediction: only() = None  # type: ignore[valid-type]
    prompt_cache_key: Label = None
    prompt_cache_options: only() = None  # type: ignore[valid-type]
    prompt_cache_retention: only("in_memory") = None  # type: ignore[valid-type]
    reasoning_effort: only("none") = None  # type: ignore[valid-type]
    response_format: only({"type": "text"}) = None  # type: ignore[valid-type]
    safety_identifier: Label = None
    service_tier: only("auto", "default") = None  # type: ignore[valid-type]
    store: only(False) = None  # type: ignore[valid-type]
    tool_choice: only("none", "auto") = None  # type: ignore[valid-type]
    tools: only([]) = None  # type: ignore[valid-type]
    verbosity: only("medium") = None  # type: ignore[valid-type]
    web_search_options: only() = None  # type: ignore[valid-type]


REQUEST_SCHEMA = schema_of(ChatBody)


def read(
    body: Mapping[str, Any],
    model: ServedModel,
    limits: RequestLimits,
    fetch: Fetch | None = None,
) -> ApiRequest:
    """Read a body; raises `ApiError`. fetch: reads pictures that are no data URLs."""
    check_part_count(body, "messages", limits)
    fields = read_fields(ChatBody, body)
    check_model(fields.model, model)
    mmi = fields.mmi or NO_EXTENSIONS
    stream = fields.stream_fields()
    _check_progress(mmi, stream["stream"])
    tokens = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    options = sampling_options(
        fields,
        mmi,
        model,
        limits,
        {
            "max_tokens": agreed(
                "max_completion_tokens", fields.max_completion_tokens, fields.max_tokens
            ),
            "max_images": _max_images(fields, mmi),
            "logprobs": _logprobs(fields),
        },
        {"max_tokens": tokens},
    )
    seconds = max_seconds_of(mmi, limits)
    builder = DocumentBuilder(model, limits, fetch)
    add_messages(builder, fields.messages)
    read = builder.build()
    images = len(read.document.images)
    return ApiRequest(
        document=read.document,
        options=with_room(options, images, mmi.max_images, model, limits),
        prompt_usage=read.usage,
        max_seconds=seconds,
        **stream,
        **reply_fields(mmi),
    )


def _check_progress(mmi: MmiFields, stream: bool) -> None:
    """Raise `ApiError` for news of pictures that have no way to the client."""
    if mmi.progress and not stream:
        raise ApiError(
            400, "conflicting_values", "`mmi.progress` needs `stream`", param="mmi.progress"
        )
    if mmi.partial_images and not mmi.progress:
        raise ApiError(
            400,
            "conflicting_values",
            "`mmi.partial_images` needs `mmi.progress`",
            param="mmi.partial_images",
        )


def _max_images(fields: ChatBody, mmi: MmiFields) -> int | None:
    """Pictures that the model may draw of its own, as `modalities` and `mmi` say."""
    if fields.modalities is None or set(fields.modalities) == {"text", "image"}:
        return mmi.max_images
    if "text" not in fields.modalities:
        raise ApiError(
            400,
            "unsupported_value",
            'the model writes text too: send ["text", "image"], or use /v1/images/generations',
            param="modalities",
        )
    drawn = any(
        isinstance(part, DrawPart)
        for message in fields.messages
        if isinstance(message.content, list)
        for part in message.content
    )
    if mmi.max_images or mmi.draw_first or drawn:
        raise ApiError(
            400,
            "conflicting_values",
            "`modalities` has no image, but the request asks for a picture",
            param="modalities",
        )
    return 0


def _logprobs(fields: ChatBody) -> int | None:
    if fields.logprobs:
        return fields.top_logprobs or 0
    if fields.top_logprobs:
        raise ApiError(
            400, "conflicting_values", "`top_logprobs` needs `logprobs`", param="top_logprobs"
        )
    return None


async def reply(
    request: ApiRequest, events: AsyncIterator[Event], context: ReplyContext
) -> dict[str, Any]:
    """The whole reply, at the end of the events. Raises what they raise, and `ApiError`."""
    content, finished = "", None
    images: list[dict[str, Any]] = []
    logprobs: list[dict[str, Any]] = []
    async for event in events:
        match event:
            case TextDelta(text, sampled):
                content += text
                logprobs += [_logprob(one, context.model) for one in sampled]
            case ImageDone(_, rgb):
                url = await picture_url(rgb, request, context)
                images.append(_image(len(images), url, len(content), request, context))
            case Finished():
                finished = event
    if finished is None:
        raise ended_early()
    reason, stats = finish_reason(finished.reason, request), context.stats()
    message = {"role": "assistant", "content": content, "refusal": None, "images": images}
    found = {"content": logprobs, "refusal": None}
    return {
        **_head(context, "chat.completion"),
        "choices": [
            {
                "index": 0,
                "message": message,
                "logprobs": found if request.options.logprobs is not None else None,
                "finish_reason": reason,
            }
        ],
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
    return sse.with_failure(_ChunkWriter(request, context).chunks(events), sse.error)


def failure(request: ApiRequest, failed: ApiError, context: ReplyContext) -> bytes:
    """The rest of a stream in which nothing but keep-alives was sent when the request failed."""
    return sse.error(failed)


def KEEP_ALIVE(request: ApiRequest, context: ReplyContext) -> bytes:
    """A chunk that says nothing, as a comment alone breaks some clients."""
    return sse.data({**_head(context, "chat.completion.chunk"), "choices": []})


class _ChunkWriter:
    """State of one stream: what was sent so far."""

    def __init__(self, request: ApiRequest, context: ReplyContext) -> None:
        self._request, self._context = request, context
        self._head = _head(context, "chat.completion.chunk")
        self._each = picture_tokens(context.model.config)
        self._usage = Usage(request.prompt_usage)
        self._characters = self._images = 0
        self._role = {"role": "assistant"}  # in the first delta alone

    async def chunks(self, events: AsyncIterator[Event]) -> AsyncGenerator[bytes]:
        """Chunks of all events. Raises what they raise, and `ApiError`."""
        finished = None
        async for event in events:  # to their end: the statistics are known then
            match event:
                case TextDelta():
                    yield self._text(event)
                case ImageStarted(_, steps) if self._request.progress:
                    yield self._news("image.started", 0, steps)
                case ImageProgress() if self._request.progress:
                    yield self._news("image.progress", event.step, event.of)
                    if event.preview is not None:
                        preview = await self._preview(event)
                        if preview is not None:
                            yield preview
                case ImageDone():
                    async for chunk in self._picture(event):
                        yield chunk
                case Finished():
                    finished = event
        if finished is None:
            raise ended_early()
        for chunk in self._end(finished):
            yield chunk

    def _text(self, event: TextDelta) -> bytes:
        self._usage = self._used(text=event.tokens)
        self._characters += len(event.text)
        logprobs = [_logprob(one, self._context.model) for one in event.logprobs]
        found = {"content": logprobs, "refusal": None} if logprobs else None
        return self._chunk({"content": event.text}, logprobs=found)

    async def _picture(self, event: ImageDone) -> AsyncGenerator[bytes]:
        """Chunks of a picture: one, or several of a line's length."""
        request, context, index = self._request, self._context, self._images
        self._images += 1
        self._usage = self._used(image=self._images * self._each)
        url = await picture_url(event.rgb, request, context)
        image = _image(index, url, self._characters, request, context)
        if request.transport != "chunked":
            yield self._chunk({"images": [image]})
            return

        def piece(number: int, text: str) -> dict[str, Any]:
            if number == 0:
                return {"images": [{**image, "image_url": {"url": text}}]}
            return {"images": [{"index": index, "image_url": {"url": text}}]}

        # The first chunk is the longest around its piece, and carries the role.
        overhead = len(self._chunk(piece(0, ""), peek=True))
        for number, text in enumerate(chunked(url, context.rules.event_bytes - overhead)):
            yield self._chunk(piece(number, text))

    def _news(self, kind: str, step: int, steps: int, **more: object) -> bytes:
        """Progress of the picture that comes next, in a chunk without choices."""
        told = {"type": kind, "index": self._images, "step": step, "steps": steps, **more}
        return sse.data({**self._head, "choices": [], **self._continuous(), "mmi": told})

    async def _preview(self, event: ImageProgress) -> bytes | None:
        """A preview; None if it does not fit a line that must not be longer."""
        assert event.preview is not None
        text = await encoded(event.preview, self._request, self._context)
        chunk = self._news("image.partial", event.step, event.of, b64=text)
        fits = len(chunk) <= self._context.rules.event_bytes
        return chunk if fits or self._request.transport == "inline" else None

    def _end(self, finished: Finished) -> list[bytes]:
        """The last chunks: reason, usage, end."""
        request, stats = self._request, self._context.stats()
        reason = finish_reason(finished.reason, request)
        self._usage = usage_of(request, finished, stats, self._context.model.config)
        found = details(request, finished, stats)
        chunks = [self._chunk({}, finish=reason, mmi=found)]
        if request.include_usage:
            usage = {"usage": self._usage.chat()}
            chunks.append(sse.data({**self._head, "choices": [], **usage}))
        return [*chunks, sse.DONE]

    def _chunk(
        self,
        delta: dict[str, Any],
        *,
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
        mmi: dict[str, Any] | None = None,
        peek: bool = False,
    ) -> bytes:
        """One chunk with a choice. peek: to measure it, without sending it."""
        choice: dict[str, Any] = {
            "index": 0,
            "delta": self._role | delta,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        if not peek:
            self._role = {}
        more = {} if mmi is None else {"mmi": mmi}
        return sse.data({**self._head, "choices": [choice], **self._continuous(), **more})

    def _continuous(self) -> dict[str, Any]:
        return {"usage": self._usage.chat()} if self._request.continuous_usage else {}

    def _used(self, *, text: int | None = None, image: int | None = None) -> Usage:
        before = self._usage
        # The count of tokens never falls, also if an event does not tell it.
        written = max(before.text, text or 0)
        return Usage(before.prompt, written, before.image if image is None else image)


def _head(context: ReplyContext, kind: str) -> dict[str, Any]:
    """Fields that begin every object of a reply."""
    return {
        "id": f"chatcmpl-{context.request_id}",
        "object": kind,
        "created": context.created,
        "model": context.model.name,
        "system_fingerprint": context.model.fingerprint,
    }


def _image(
    index: int, url: str, offset: int, request: ApiRequest, context: ReplyContext
) -> dict[str, Any]:
    """A picture of a reply. offset: code points of the text before it."""
    options, model = request.options, context.model
    schedule = options.schedule or next(iter(model.steps))
    return {
        "index": index,
        "type": "image_url",
        "image_url": {"url": url},
        "mmi": {"offset": offset, "seed": options.seed, "steps": model.steps[schedule]},
    }


def _logprob(sampled: Sampled, model: ServedModel) -> dict[str, Any]:
    """A token with its log probability, and those of the most probable ones."""
    found = _token(sampled.token, sampled.logprob, model)
    return {**found, "top_logprobs": [_token(*one, model) for one in sampled.top]}


def _token(token_id: int, logprob: float | None, model: ServedModel) -> dict[str, Any]:
    text = model.tokenizer.spelling(token_id)
    value = _NO_LOGPROB if logprob is None else max(logprob, _NO_LOGPROB)
    data = list(bytes([int(text[3:5], 16)]) if model.tokenizer.is_byte(token_id) else text.encode())
    return {"token": text, "logprob": value, "bytes": data}
