"""`/v1/images/generations`: pictures for a prompt.

Each picture is a document of its own, the prompt and a place to draw, with the seed counted up.
`ImagesRequest.requests` has them in order; `reply` and `stream` take the events of each, in that
order too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.events import Event, Finished, ImageDone, ImageProgress
from mmi_deploy.server.api import sse
from mmi_deploy.server.api.api_request import ApiRequest, OutputFormat
from mmi_deploy.server.api.document_parts import DocumentBuilder
from mmi_deploy.server.api.drawn_images import check_size, preview_of, size_of
from mmi_deploy.server.api.endings import details, ended_early, finish_reason, usage_of
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.fields import (
    NO_EXTENSIONS,
    BeamFields,
    Fields,
    Label,
    MmiFields,
    ModelName,
    Positive,
    Stream,
    String,
    Whole,
    agreed,
    check_compression,
    check_limit,
    check_model,
    max_seconds_of,
    most_images,
    only,
    options_of,
    read_fields,
    reply_fields,
)
from mmi_deploy.server.api.picture_urls import encoded, picture_url
from mmi_deploy.server.api.pictures import Fetch
from mmi_deploy.server.api.reply_context import ReplyContext
from mmi_deploy.server.api.schemas import schema_of
from mmi_deploy.server.api.usage import PromptUsage, Usage
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import RequestLimits

Json = dict[str, Any]


class ImagesBody(Fields):
    """A request of pictures."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "tiny", "prompt": "the red square", "mmi": {"seed": 7}}]
        }
    )

    model: ModelName | None = None
    prompt: Annotated[String, Field(min_length=1)]
    n: Positive | None = Field(
        None, description="Pictures, each with the seed after that of the one before."
    )
    size: String | None = Field(None, description="`auto`, or the model's.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="`b64_json` unless given; `url` is a path of this server."
    )
    output_format: OutputFormat | None = Field(
        None, description="`png`, which is exact, unless given."
    )
    output_compression: Annotated[Whole, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of `webp` and `jpeg`."
    )
    stream: Stream = None
    partial_images: Annotated[Whole, Field(ge=0, le=3)] | None = Field(
        None, description="Previews of each picture in a stream."
    )
    user: Label = None
    safety_identifier: Label = None
    background: only("auto", "opaque") = None  # type: ignore[valid-type]
    complexity: only() = None  # type: ignore[valid-type]
    frame_count: only() = None  # type: ignore[valid-type]
    frame_duration_ms: only() = None  # type: ignore[valid-type]
    moderation: only("auto", "low") = None  # type: ignore[valid-type]
    quality: only("auto", "standard") = None  # type: ignore[valid-type]
    style: only() = None  # type: ignore[valid-type]
    svg: only() = None  # type: ignore[valid-type]
    mmi: MmiFields | None = None


# Extensions without a meaning for pictures alone.
_OF_TEXT = (
    *("max_images", "draw_first", "turn_tokens", "min_tokens", "progress"),
    *BeamFields.model_fields,
)


def _schema() -> Json:
    """Schema of a body, without the extensions that are refused."""
    schema = schema_of(ImagesBody)
    for choice in schema["properties"]["mmi"]["anyOf"]:
        for name in _OF_TEXT:
            choice.get("properties", {}).pop(name, None)
    return schema


REQUEST_SCHEMA = _schema()


@dataclass(frozen=True, kw_only=True)
class ImagesRequest(ApiRequest):
    """A request of `/v1/images/generations`. pictures: their number."""

    pictures: int = 1

    @property
    def requests(self) -> tuple[ApiRequest, ...]:
        """One request for each picture: the i-th has the i-th seed from `options.seed` on."""
        first = self.options.seed
        seeds = [(first + number) % 2**64 for number in range(self.pictures)]
        return tuple(
            replace(self, options=replace(self.options, seed=seed), pictures=1) for seed in seeds
        )


def read(
    body: Mapping[str, Any],
    model: ServedModel,
    limits: RequestLimits,
    fetch: Fetch | None = None,
) -> ImagesRequest:
    """Read a body. Raises `ApiError`. fetch: as on the other endpoints; no pictures are given."""
    fields = read_fields(ImagesBody, body)
    mmi = fields.mmi or NO_EXTENSIONS
    if fields.model is not None:
        check_model(fields.model, model)
    check_size(fields.size, model, "size")
    for name in _OF_TEXT:
        if getattr(mmi, name):
            param = f"mmi.{name}"
            raise ApiError(
                400, "unsupported_value", f"`{param}` has no meaning for pictures", param=param
            )
    pictures = 1 if fields.n is None else fields.n
    check_limit("pictures", "too_many_images", pictures, most_images(model, limits), "n")
    builder = DocumentBuilder(model, limits)
    builder.text(fields.prompt, "prompt")
    builder.draw("prompt")
    previews = agreed("partial_images", fields.partial_images, mmi.partial_images)
    values = {"max_tokens": 0, "max_images": 0, "previews": previews if fields.stream else None}
    options = options_of(model, limits, mmi, values)
    read = builder.build()
    return ImagesRequest(
        document=read.document,
        options=options,
        prompt_usage=read.usage,
        max_seconds=max_seconds_of(mmi, limits),
        stream=bool(fields.stream),
        pictures=pictures,
        **{**reply_fields(mmi), **_sending(fields, mmi)},
    )


def _sending(fields: ImagesBody, mmi: MmiFields) -> dict[str, Any]:
    """Fields of `ApiRequest` that say how pictures are sent. Raises `ApiError`."""
    if mmi.image_transport == "chunked":
        raise ApiError(
            400,
            "unsupported_value",
            "pictures are sent whole here: use the transport `url`, or /v1/chat/completions",
            param="mmi.image_transport",
        )
    formats = {None: None, "b64_json": "inline", "url": "url"}
    found = {
        "transport": agreed(
            "response_format", formats[fields.response_format], mmi.image_transport
        ),
        "output_format": agreed("output_format", fields.output_format, mmi.output_format),
        "output_compression": agreed(
            "output_compression", fields.output_compression, mmi.output_compression
        ),
    }
    check_compression(found["output_format"], found["output_compression"], "output_compression")
    return {name: value for name, value in found.items() if value is not None}


async def reply(
    request: ImagesRequest, events: Sequence[AsyncIterator[Event]], context: ReplyContext
) -> Json:
    """The whole reply. events: of `request.requests`, in their order. Raises what they raise."""
    requests = request.requests
    data: list[Json] = [{} for _ in requests]
    used: list[Usage] = []
    async with aclosing(_merged(events)) as merged:
        async for number, happened in merged:
            match happened:
                case ImageDone(_, rgb):
                    data[number] |= await _picture(request, rgb, context)
                case Finished():
                    used.append(_usage(requests[number], happened, context))
                    data[number]["mmi"] = _details(requests, number, happened, context)
    return {
        "created": context.created,
        "system_fingerprint": context.model.fingerprint,
        **_look(request),
        "size": size_of(context.model),
        "data": data,
        "usage": _sum(used).images(),
    }


def stream(
    request: ImagesRequest, events: Sequence[AsyncIterator[Event]], context: ReplyContext
) -> AsyncIterator[bytes]:
    """Previews, and each picture when it is finished; `mmi.index` numbers the pictures.

    events: as of `reply`. An error before the first item is raised, a later one is the last item.
    """
    return sse.with_failure(_items(request, events, context), sse.error)


async def _items(
    request: ImagesRequest, events: Sequence[AsyncIterator[Event]], context: ReplyContext
) -> AsyncGenerator[bytes, None]:
    requests = request.requests
    shared = {"created_at": context.created, "quality": "auto", **_look(request)}
    previews = [0] * len(requests)
    drawn: dict[int, Rgb] = {}
    async with aclosing(_merged(events)) as merged:
        async for number, happened in merged:
            match happened:
                case ImageProgress(_, _, _, preview) if preview is not None:
                    text, size = await preview_of(preview, request, context)
                    partial = {
                        "type": "image_generation.partial_image",
                        "b64_json": text,
                        "partial_image_index": previews[number],
                        "size": size,
                        "mmi": {"index": number},
                    }
                    previews[number] += 1
                    yield sse.event(partial | shared)
                case ImageDone(_, rgb):
                    drawn[number] = rgb
                case Finished():
                    usage = _usage(requests[number], happened, context)
                    completed = {
                        "type": "image_generation.completed",
                        "b64_json": "",
                        **await _picture(request, drawn.pop(number), context),
                        "size": size_of(context.model),
                        "usage": usage.images(),
                        "mmi": _details(requests, number, happened, context),
                    }
                    yield sse.event(completed | shared)


def failure(request: ApiRequest, failed: ApiError, context: ReplyContext) -> bytes:
    """The rest of a stream in which nothing but keep-alives was sent when the request failed."""
    return sse.error(failed)


def KEEP_ALIVE(request: ApiRequest, context: ReplyContext) -> bytes:
    """A comment: clients skip it."""
    return sse.KEEP_ALIVE_COMMENT


async def _picture(request: ImagesRequest, rgb: Rgb, context: ReplyContext) -> Json:
    if request.transport == "url":
        return {"url": await picture_url(rgb, request, context)}
    return {"b64_json": await encoded(rgb, request, context)}


def _look(request: ImagesRequest) -> Json:
    return {"background": "opaque", "output_format": request.output_format}


def _usage(request: ApiRequest, finished: Finished, context: ReplyContext) -> Usage:
    """Usage of one picture. Raises `ApiError` if it was ended early."""
    finish_reason(finished.reason, request)
    return usage_of(request, finished, None, context.model.config)


def _sum(used: Sequence[Usage]) -> Usage:
    prompt = PromptUsage(
        sum(one.prompt.text for one in used), sum(one.prompt.image for one in used)
    )
    return Usage(prompt, 0, sum(one.image for one in used))


def _details(
    requests: Sequence[ApiRequest], number: int, finished: Finished, context: ReplyContext
) -> Json:
    """`mmi` of a picture. The statistics of the context are those of one document."""
    stats = context.stats() if len(requests) == 1 else None
    found = details(requests[number], finished, stats)
    del found["reason"]  # every picture has the same
    return {"index": number, **found}


async def _merged(
    events: Sequence[AsyncIterator[Event]],
) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of all documents as they happen, with the number of the document.

    Raises the first error of any, also that of events without an end. No source gets ahead of
    another that has an event.
    """

    async def next_of(source: AsyncIterator[Event]) -> Event | None:
        return await anext(source, None)

    numbers = {asyncio.create_task(next_of(one)): place for place, one in enumerate(events)}
    ends: dict[int, Finished] = {}  # told when nothing follows: the statistics are known then
    try:
        while numbers:
            done, _ = await asyncio.wait(numbers, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: numbers[task]):
                number = numbers.pop(task)
                event = task.result()
                if event is not None:
                    numbers[asyncio.create_task(next_of(events[number]))] = number
                if isinstance(event, Finished):
                    ends[number] = event
                elif event is not None:
                    yield number, event
                elif number in ends:
                    yield number, ends[number]
                else:
                    raise ended_early()
    finally:
        for task in numbers:
            task.cancel()
        await asyncio.gather(*numbers, return_exceptions=True)
