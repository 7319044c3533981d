"""`/v1/responses`: text and pictures in the order in which the model makes them.

Pictures that `mmi.draw` parts of the input ask for are the first items of the output; their
`mmi.place` numbers the part, so that input and output, sent together as the next input, are the
document that the model had.

Transports of pictures. `inline`: base64 in `result`, once more in the last event. `url`: `result`
is empty and `mmi.url` has the path. `chunked`, of streams: `result` is empty and its pieces come
before, as `mmi.result` of `…image_generation_call.generating` events with `mmi.offset`; a client
that checks events knows no others. Without a stream it is `inline`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mmi_deploy.runtime.events import Event
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.server.api import sse
from mmi_deploy.server.api.api_request import ApiRequest, OutputFormat
from mmi_deploy.server.api.document_parts import DocumentBuilder, check_part_count
from mmi_deploy.server.api.drawn_images import check_size
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.fields import (
    NO_EXTENSIONS,
    Count,
    Fields,
    Label,
    MmiFields,
    ModelName,
    String,
    Whole,
    agreed,
    at_most,
    check_compression,
    check_model,
    max_seconds_of,
    only,
    read_fields,
    reply_fields,
    with_room,
)
from mmi_deploy.server.api.pictures import Fetch
from mmi_deploy.server.api.reply_context import ReplyContext
from mmi_deploy.server.api.responses_events import Json, ResponsesRequest, ResponseWriter
from mmi_deploy.server.api.responses_input import Item, add_input
from mmi_deploy.server.api.sampling_fields import SamplingFields, sampling_options
from mmi_deploy.server.api.schemas import schema_of
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import RequestLimits


class ImageTool(Fields):
    """The tool without which the model draws no pictures of its own accord."""

    type: Literal["image_generation"]
    partial_images: Annotated[Whole, Field(ge=0, le=3)] | None = Field(
        None, description="Previews of each picture in a stream."
    )
    output_format: OutputFormat | None = Field(None, description="`png` is exact.")
    output_compression: Annotated[Whole, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of `webp` and `jpeg`."
    )
    size: String | None = Field(None, description="`auto`, or the model's.")
    action: only("auto", "generate") = None  # type: ignore[valid-type]
    background: only("auto", "opaque") = None  # type: ignore[valid-type]
    complexity: only() = None  # type: ignore[valid-type]
    frame_count: only() = None  # type: ignore[valid-type]
    frame_duration_ms: only() = None  # type: ignore[valid-type]
    input_fidelity: only() = None  # type: ignore[valid-type]
    input_image_mask: only() = None  # type: ignore[valid-type]
    model: only() = None  # type: ignore[valid-type]
    moderation: only("auto", "low") = None  # type: ignore[valid-type]
    quality: only("auto") = None  # type: ignore[valid-type]
    svg: only() = None  # type: ignore[valid-type]


class ToolChoice(Fields):
    """Begin with a picture."""

    type: Literal["image_generation"]


class TextOptions(Fields):
    """Options of texts."""

    format: only({"type": "text"}) = None  # type: ignore[valid-type]
    verbosity: only("medium") = None  # type: ignore[valid-type]


Metadata = Annotated[
    dict[Annotated[String, Field(max_length=64)], Annotated[String, Field(max_length=512)]],
    at_most(16),
    Field(json_schema_extra={"maxProperties": 16}),
]


class ResponsesBody(SamplingFields):
    """A request of a response."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "tiny",
                    "input": "the red square moves down.",
                    "tools": [{"type": "image_generation", "partial_images": 2}],
                    "max_output_tokens": 16,
                    "mmi": {"seed": 7, "max_images": 1},
                }
            ]
        }
    )

    model: ModelName
    input: String | list[Item] = Field(
        description="Joined in order, nothing is inserted; system and developer messages first."
    )
    instructions: String | None = Field(None, description="Text before the input.")
    max_output_tokens: Count | None = Field(
        None, description="Text tokens to write; 256 unless given. Pictures do not count."
    )
    max_tool_calls: Count | None = Field(
        None, description="Pictures that the model may draw, as `mmi.max_images`."
    )
    tools: Annotated[list[ImageTool], Field(max_length=1)] | None = Field(
        None, description="Without the tool `image_generation` only `mmi.draw` parts are drawn."
    )
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = Field(
        None, description="`none`: no picture. `required`: begin with one."
    )
    metadata: Metadata | None = Field(None, description="The response repeats it.")
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    parallel_tool_calls: bool | None = Field(None, description="Accepted, without an effect.")
    store: bool | None = Field(None, description="Accepted; nothing is stored.")
    text: TextOptions | None = None
    mmi: MmiFields | None = Field(None, description="Extensions of this server.")

    access_programs: only() = None  # type: ignore[valid-type]
    background: only(False) = None  # type: ignore[valid-type]
    background_options: only() = None  # type: ignore[valid-type]
    context_management: only([]) = None  # type: ignore[valid-type]
    conversation: only() = None  # type: ignore[valid-type]
    image: only() = None  # type: ignore[valid-type]
    include: only([]) = None  # type: ignore[valid-type]
    moderation: only() = None  # type: ignore[valid-type]
    previous_response_id: only() = None  # type: ignore[valid-type]
    prompt: only() = None  # type: ignore[valid-type]
    prompt_cache_options: only({}, {"mode": "implicit"}) = None  # type: ignore[valid-type]
    prompt_cache_retention: only("in_memory") = None  # type: ignore[valid-type]
    reasoning: only({}, {"effort": None}, {"effort": "none"}) = None  # type: ignore[valid-type]
    service_tier: only("auto", "default") = None  # type: ignore[valid-type]
    top_logprobs: only(0) = None  # type: ignore[valid-type]
    truncation: only("disabled") = None  # type: ignore[valid-type]


REQUEST_SCHEMA = schema_of(ResponsesBody)


def read(
    body: Mapping[str, Any],
    model: ServedModel,
    limits: RequestLimits,
    fetch: Fetch | None = None,
) -> ResponsesRequest:
    """Read a body. Raises `ApiError`. fetch: reads pictures that are no data URLs."""
    check_part_count(body, "input", limits)
    fields = read_fields(ResponsesBody, body)
    check_model(fields.model, model)
    tool = fields.tools[0] if fields.tools else None
    mmi = fields.mmi or NO_EXTENSIONS
    values = {
        "max_tokens": fields.max_output_tokens,
        "previews": _previews(fields, tool, mmi),
        **_drawing(fields, tool, mmi),
    }
    names = {"max_tokens": "max_output_tokens"}
    options = sampling_options(fields, mmi, model, limits, values, names)
    seconds = max_seconds_of(mmi, limits)
    sending = fields.stream_fields() | _sending(fields, tool, mmi, model)
    builder = DocumentBuilder(model, limits, fetch)
    places = add_input(builder, fields.instructions, fields.input)
    read = builder.build()
    images = len(read.document.images)
    options = with_room(options, images, mmi.max_images, model, limits)
    return ResponsesRequest(
        document=read.document,
        options=options,
        prompt_usage=read.usage,
        max_seconds=seconds,
        places=places,
        echo=_echo(fields, options),
        **sending,
    )


def _previews(fields: ResponsesBody, tool: ImageTool | None, mmi: MmiFields) -> int | None:
    """Previews of each picture: there is no place for them but in a stream."""
    own = tool.partial_images if tool else None
    previews = agreed("partial_images", own, mmi.partial_images)
    return previews if fields.stream else None


def _drawing(fields: ResponsesBody, tool: ImageTool | None, mmi: MmiFields) -> dict[str, Any]:
    """Options of pictures that the model draws of its own accord. Raises `ApiError`."""
    choice = fields.tool_choice
    forced = choice == "required" or isinstance(choice, ToolChoice)
    if tool is None or choice == "none":
        asked = {
            "mmi.max_images": bool(mmi.max_images),
            "mmi.draw_first": bool(mmi.draw_first),
            "tool_choice": forced,
        }
        for param in (param for param, given in asked.items() if given):
            raise ApiError(
                400,
                "conflicting_values",
                f'`{param}` needs the tool {{"type": "image_generation"}} in `tools`, and a '
                "`tool_choice` that allows it: without it the model draws nothing by itself",
                param=param,
            )
        return {"max_images": 0}
    given = [count for count in (mmi.max_images, fields.max_tool_calls) if count is not None]
    most = min(given) if given else None
    if forced and most == 0:
        raise ApiError(
            400,
            "conflicting_values",
            "`tool_choice` asks for a picture, and the request allows none",
            param="tool_choice",
        )
    return {"max_images": most, "draw_first": True if forced else mmi.draw_first}


def _sending(
    fields: ResponsesBody, tool: ImageTool | None, mmi: MmiFields, model: ServedModel
) -> dict[str, Any]:
    """Fields of `ApiRequest` that say how pictures are sent. Raises `ApiError` for a size that is
    not the model's."""
    found = reply_fields(mmi)
    if not fields.stream and found.get("transport") == "chunked":
        del found["transport"]
    if tool is not None:
        check_size(tool.size, model, "tools[0].size")
        for name in ("output_format", "output_compression"):
            if (value := agreed(name, getattr(tool, name), getattr(mmi, name))) is not None:
                found[name] = value
        form, quality = found.get("output_format"), found.get("output_compression")
        check_compression(form, quality, "tools[0].output_compression")
    return found


def _echo(fields: ResponsesBody, options: GenerationOptions) -> Json:
    """Fields that the response repeats."""
    sent = fields.model_dump(include={"tools", "tool_choice"}, exclude_none=True)
    return {
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": fields.max_tool_calls,
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "prompt_cache_key": fields.prompt_cache_key,
        "safety_identifier": fields.safety_identifier,
        "temperature": options.temperature,
        "tool_choice": sent.get("tool_choice", "auto"),
        "tools": sent.get("tools", []),
        "top_p": options.top_p,
        "user": fields.user,
    }


async def reply(
    request: ResponsesRequest, events: AsyncIterator[Event], context: ReplyContext
) -> Json:
    """The whole response, at the end of the events. Raises what they raise, and `ApiError`."""
    writer = ResponseWriter(request, context)
    async for event in events:
        await writer.take(event)
    response: Json = writer.end()[-1]["response"]
    return response


def stream(
    request: ResponsesRequest, events: AsyncIterator[Event], context: ReplyContext
) -> AsyncIterator[bytes]:
    """The response as events, one an item.

    An error before the first event of the document is raised: the status line can still tell it. A
    later one ends the response: the last item.
    """
    writer = ResponseWriter(request, context)
    return sse.with_failure(
        _items(writer, events), lambda error: b"".join(map(sse.event, writer.fail(error)))
    )


async def _items(
    writer: ResponseWriter, events: AsyncIterator[Event]
) -> AsyncGenerator[bytes, None]:
    async for event in events:
        for item in await writer.take(event):
            yield sse.event(item)
    for item in writer.end():
        yield sse.event(item)


def failure(request: ResponsesRequest, error: ApiError, context: ReplyContext) -> bytes:
    """The response to an error before the first event of the document, where keep-alives have been
    sent, and so a status of 200."""
    writer = ResponseWriter(request, context)
    return b"".join(map(sse.event, writer.fail(error)))


def KEEP_ALIVE(request: ApiRequest, context: ReplyContext) -> bytes:
    """A comment: clients skip it."""
    return sse.KEEP_ALIVE_COMMENT
