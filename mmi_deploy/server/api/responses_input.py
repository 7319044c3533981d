"""`input` of `/v1/responses`: items of a conversation to one document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from mmi_deploy.server.api.document_parts import DocumentBuilder, DrawPart
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.fields import Count, Fields, Label, only

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Fields):
    """A text."""

    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: only() = None  # type: ignore[valid-type]


class OutputText(Fields):
    """A text of a reply, as the server sent it."""

    type: Literal["output_text"]
    text: str
    annotations: only([]) = None  # type: ignore[valid-type]
    logprobs: only([]) = None  # type: ignore[valid-type]
    parsed: only() = None  # type: ignore[valid-type]


class InputImage(Fields):
    """A picture."""

    type: Literal["input_image"]
    image_url: str = Field(
        description="A data URL: `data:image/png;base64,...` (PNG, JPEG, WebP, GIF or BMP).",
        examples=["data:image/png;base64,iVBORw0KGgo..."],
    )
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Accepted; the model has one size of pictures."
    )
    file_id: only() = None  # type: ignore[valid-type]
    prompt_cache_breakpoint: only() = None  # type: ignore[valid-type]


Content = Annotated[InputText | OutputText | InputImage | DrawPart, Field(discriminator="type")]


class MessageItem(Fields):
    """A message of anyone."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Content]
    id: Label = None
    status: Status | None = Field(None, description="Accepted, without an effect.")
    phase: Literal["commentary", "final_answer"] | None = Field(
        None, description="Accepted, without an effect."
    )


class DrawnFields(Fields):
    """About a drawn picture, as the server sent it."""

    place: Count | None = Field(
        None,
        description="The picture was drawn for this `mmi.draw` part of the input, counted from 0, "
        "and is read there.",
    )
    seed: Any = None
    steps: Any = None
    url: str | None = Field(None, description="Path of the picture, where `result` is empty.")
    result_length: Any = None


class DrawnItem(Fields):
    """A picture of a reply, as the server sent it."""

    type: Literal["image_generation_call"]
    result: str | None = Field(
        description="The picture's file in base64; null if the picture was not finished."
    )
    id: Label = None
    status: Literal["in_progress", "generating", "completed", "failed"] | None = None
    action: Label = None
    background: Label = None
    error: only() = None  # type: ignore[valid-type]
    output_format: Label = None
    quality: Label = None
    revised_prompt: Label = None
    size: Label = None
    svg_usage: only() = None  # type: ignore[valid-type]
    mmi: DrawnFields | None = None


def _kind_of(item: object) -> object:
    """`type` of an item, which a message may leave out."""
    if isinstance(item, Mapping):
        return item.get("type", "message")
    return getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")] | Annotated[DrawnItem, Tag("image_generation_call")],
    Discriminator(_kind_of),
]


@dataclass(frozen=True)
class _Entry:
    """A part of the document, or the beginning of a turn of the model.

    content: of a text, a URL or base64. number: of a place to draw. first: instructions, which come
    before all others.
    """

    kind: Literal["text", "url", "base64", "draw", "reply"]
    content: str
    param: str
    number: int = 0
    first: bool = False


def add_input(
    builder: DocumentBuilder,
    instructions: str | None,
    items: str | Sequence[MessageItem | DrawnItem],
) -> dict[int, int]:
    """Add `instructions`, then `system` and `developer` messages, then the rest, each in order.

    Returns the number of the `mmi.draw` part for each picture of the document that is still to be
    drawn, by the picture's index. Raises `ApiError`.
    """
    entries = _entries(items)
    if instructions:
        entries.insert(0, _Entry("text", instructions, "instructions", first=True))
    places: dict[int, int] = {}
    pictures = 0
    for entry in sorted(entries, key=lambda entry: not entry.first):
        match entry.kind:
            case "reply":
                builder.begin_reply()
                continue
            case "text":
                builder.text(entry.content, entry.param)
                continue
            case "url":
                builder.picture(entry.content, entry.param)
            case "base64":
                builder.picture_base64(entry.content, entry.param)
            case "draw":
                builder.draw(entry.param)
                places[pictures] = entry.number
        pictures += 1
    return places


def _entries(items: str | Sequence[MessageItem | DrawnItem]) -> list[_Entry]:
    """Parts of all items; a picture that was drawn for a place of the input stands there."""
    if isinstance(items, str):
        return [_Entry("text", items, "input")] if items else []
    entries: list[_Entry] = []
    draws: list[int] = []  # of each place: its index among the entries
    for number, item in enumerate(items):
        param = f"input[{number}]"
        if isinstance(item, MessageItem):
            for entry in _message_entries(item, param):
                if entry.kind == "draw":
                    entry = replace(entry, number=len(draws))
                    draws.append(len(entries))
                entries.append(entry)
            continue
        drawn = _drawn_entry(item, param)
        place = item.mmi.place if item.mmi else None
        if drawn is None:
            continue
        if place is None:
            entries.append(drawn)
        elif place < len(draws) and entries[draws[place]].kind == "draw":
            entries[draws[place]] = replace(drawn, first=entries[draws[place]].first)
        else:
            raise ApiError(
                400,
                "invalid_value",
                f"`{param}.mmi.place` must number a `mmi.draw` part before it, once; leave it out "
                "where that part is no longer there",
                param=f"{param}.mmi.place",
            )
    return entries


def _message_entries(message: MessageItem, param: str) -> Iterator[_Entry]:
    first = message.role in ("system", "developer")
    if message.role == "assistant":
        yield _Entry("reply", "", param)
    if isinstance(message.content, str):
        if message.content:
            yield _Entry("text", message.content, f"{param}.content", first=first)
        return
    for number, part in enumerate(message.content):
        place = f"{param}.content[{number}]"
        match part:
            case InputText() | OutputText():
                yield _Entry("text", part.text, f"{place}.text", first=first)
            case InputImage():
                yield _Entry("url", part.image_url, f"{place}.image_url", first=first)
            case DrawPart():
                yield _Entry("draw", "", place, first=first)


def _drawn_entry(item: DrawnItem, param: str) -> _Entry | None:
    """The picture of a reply; None for one that was never finished."""
    if item.result:
        return _Entry("base64", item.result, f"{param}.result")
    if item.mmi and item.mmi.url:
        return _Entry("url", item.mmi.url, f"{param}.mmi.url")
    if item.result is None and item.status not in ("completed", None):
        return None
    raise ApiError(
        400,
        "missing_image",
        f"`{param}.result` is empty: put the picture's file in it, in base64; of a reply with the "
        "transport `chunked` it is the joined pieces",
        param=f"{param}.result",
    )
