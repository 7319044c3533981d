"""Messages and items of a conversation to one document.

The model continues documents and has no template of a conversation: texts and pictures of all
messages are joined in their order and nothing is inserted between them. `system` and `developer`
messages, and `instructions`, come first. A turn of the assistant may come back as it was sent, in
any of its forms, and gives the document that the model had. Whitespace next to pictures, at both
ends, and before a turn of the assistant is stripped, as it was when the model wrote that turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmi_deploy.documents.document import (
    Document,
    Draw,
    Image,
    Part,
    Text,
    document_of,
    encode_document,
)
from mmi_deploy.errors import DocumentError
from mmi_deploy.server.api.errors import ApiError, api_error_of
from mmi_deploy.server.api.fields import Fields, Whole, check_limit, most_images, only
from mmi_deploy.server.api.pictures import Fetch, PictureReader
from mmi_deploy.server.api.usage import PromptUsage
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import RequestLimits


@dataclass(frozen=True)
class ReadDocument:
    """A document that fits the model, and its tokens."""

    document: Document
    usage: PromptUsage
    token_ids: tuple[int, ...]


class DocumentBuilder:
    """Collects the parts of a document in order, and checks limits before it decodes pictures."""

    def __init__(
        self, model: ServedModel, limits: RequestLimits, fetch: Fetch | None = None
    ) -> None:
        """fetch: reads pictures that are no data URLs, see `PictureReader`."""
        self._model, self._limits = model, limits
        self._reader = PictureReader(model.given_side, limits, fetch)
        self._parts: list[Part] = []
        self._pending: dict[int, tuple[str, str, bool]] = {}  # by place: content, field, is a URL
        self._count = self._text_bytes = self._images = 0

    def text(self, text: str, param: str) -> None:
        """Add a text; `param` names its field in errors, as everywhere here."""
        self._count_part(param)
        try:
            self._parts.append(Text(text))
        except DocumentError as error:
            raise api_error_of(error, param=param) from None
        self._text_bytes += len(text.encode())
        check_limit(
            "bytes of text", "text_too_long", self._text_bytes, self._limits.text_bytes, param
        )

    def picture(self, url: str, param: str) -> None:
        """Add a picture by its data URL."""
        self._add_picture(url, param, True)

    def picture_base64(self, text: str, param: str) -> None:
        """Add a picture by the base64 of its file."""
        self._add_picture(text, param, False)

    def draw(self, param: str) -> None:
        """Add a place where the model draws a picture."""
        self._count_part(param)
        self._count_image(param)
        self._parts.append(Draw())

    def begin_reply(self) -> None:
        """Drop whitespace at the end: a turn of the model follows, and when the model began to
        write it, that was the end of its document, which has none."""
        while self._parts and isinstance(part := self._parts[-1], Text):
            self._parts.pop()
            if text := part.text.rstrip():
                self._parts.append(Text(text))
                return

    def build(self) -> ReadDocument:
        """Check the document as a whole, then decode its pictures. Raises `ApiError`."""
        encoded = self._encoded(document_of(*self._parts))
        for place, (content, param, is_url) in self._pending.items():
            reader = self._reader
            rgb = reader.of_url(content, param) if is_url else reader.of_base64(content, param)
            self._parts[place] = Image(rgb)
        return replace(encoded, document=document_of(*self._parts))

    def _encoded(self, document: Document) -> ReadDocument:
        model = self._model
        context = min(model.limits.context, model.config.llama.context)
        try:
            encoded = encode_document(
                document, model.tokenizer, model.config, context, model.limits.images
            )
        except DocumentError as error:
            tokens = self._tokens(document)
            if tokens is not None and tokens > context:
                raise ApiError(
                    400,
                    "context_length_exceeded",
                    f"the request has {tokens} tokens, pictures included; the model takes at most "
                    f"{context}",
                ) from None
            raise api_error_of(error) from None
        usage = PromptUsage.of(encoded, model.config)
        return ReadDocument(document, usage, tuple(encoded.token_ids.tolist()))

    def _tokens(self, document: Document) -> int | None:
        """Number of tokens; None if a text has words that the model does not know."""
        each = 1 + self._model.config.visual_tokens
        encode = self._model.tokenizer.encode
        try:
            return 1 + sum(
                len(encode(part.text)) if isinstance(part, Text) else each
                for part in document.parts
            )
        except DocumentError:
            return None

    def _add_picture(self, content: str, param: str, is_url: bool) -> None:
        self._count_part(param)
        self._count_image(param)
        self._pending[len(self._parts)] = content, param, is_url
        self._parts.append(_PLACEHOLDER)

    def _count_part(self, param: str) -> None:
        self._count += 1
        check_limit("parts", "too_many_parts", self._count, self._limits.parts, param)

    def _count_image(self, param: str) -> None:
        self._images += 1
        most = most_images(self._model, self._limits)
        check_limit("pictures", "too_many_images", self._images, most, param)


# Stands for a picture until its file is decoded: only its place matters to tokens.
_PLACEHOLDER = Image(np.zeros((1, 1, 3), np.uint8))


def check_part_count(body: object, name: str, limits: RequestLimits) -> None:
    """Raise `ApiError` for too many parts in the field `name` of a body, before it is read:
    messages, or items, and the parts of their `content`."""
    messages = body.get(name) if isinstance(body, Mapping) else None
    if isinstance(messages, list):
        count = 0
        for message in messages:
            content = message.get("content") if isinstance(message, Mapping) else None
            count += max(len(content), 1) if isinstance(content, list) else 1
        check_limit("parts", "too_many_parts", count, limits.parts, name)


class ImageUrl(Fields):
    """A picture by its URL."""

    url: str = Field(
        description="A data URL: `data:image/png;base64,...` (PNG, JPEG, WebP, GIF or BMP).",
        examples=["data:image/png;base64,iVBORw0KGgo..."],
    )
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="Accepted; the model has one size of pictures."
    )


class OffsetFields(Fields):
    """Place of a picture in a reply, as the server sent it."""

    offset: Annotated[Whole, Field(ge=0)] | None = Field(
        None, description="Number of code points of `content` before the picture."
    )
    seed: Any = None
    steps: Any = None


class TextPart(Fields):
    """A text."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: only() = None  # type: ignore[valid-type]


class ImagePart(Fields):
    """A picture. An element of a reply's `images` is one as it is."""

    type: Literal["image_url"]
    image_url: ImageUrl
    index: Whole | None = None
    mmi: OffsetFields | None = None
    prompt_cache_breakpoint: only() = None  # type: ignore[valid-type]


class DrawPart(Fields):
    """A place where the model draws a picture before it reads on."""

    type: Literal["mmi.draw"]


ChatPart = Annotated[TextPart | ImagePart | DrawPart, Field(discriminator="type")]


class GivenMessage(Fields):
    """A message of the user, or instructions."""

    role: Literal["user", "system", "developer"]
    content: str | list[ChatPart]
    name: str | None = Field(None, description="Accepted; the model sees no names.")


class AssistantMessage(Fields):
    """A turn of the model: a reply's message as it is, or its parts in order."""

    role: Literal["assistant"]
    content: str | list[ChatPart] | None = None
    images: list[ImagePart] | None = Field(
        None,
        description="Pictures of a reply, at their `mmi.offset` in `content`; at its end without.",
    )
    name: str | None = None
    refusal: only() = None  # type: ignore[valid-type]
    audio: only() = None  # type: ignore[valid-type]
    function_call: only() = None  # type: ignore[valid-type]
    tool_calls: only([]) = None  # type: ignore[valid-type]
    annotations: only([]) = None  # type: ignore[valid-type]
    parsed: only() = None  # type: ignore[valid-type]


Message = Annotated[GivenMessage | AssistantMessage, Field(discriminator="role")]


def add_messages(
    builder: DocumentBuilder, messages: Sequence[GivenMessage | AssistantMessage]
) -> None:
    """Add the messages of a chat. Raises `ApiError`."""
    numbered = list(enumerate(messages))
    first = [one for one in numbered if one[1].role in ("system", "developer")]
    rest = [one for one in numbered if one[1].role not in ("system", "developer")]
    for number, message in first + rest:
        param = f"messages[{number}]"
        if isinstance(message, AssistantMessage):
            builder.begin_reply()
        images = message.images if isinstance(message, AssistantMessage) else None
        if isinstance(message.content, list):
            if images:
                raise ApiError(
                    400,
                    "conflicting_values",
                    f"`{param}.images` goes with a `content` that is a string; put the pictures "
                    "into its list instead",
                    param=f"{param}.images",
                )
            add_parts(builder, message.content, f"{param}.content")
        else:
            _add_reply(builder, message.content or "", images or (), param)


def add_parts(
    builder: DocumentBuilder, parts: Iterable[TextPart | ImagePart | DrawPart], param: str
) -> None:
    """Add the parts of a message."""
    for number, part in enumerate(parts):
        place = f"{param}[{number}]"
        match part:
            case TextPart():
                builder.text(part.text, f"{place}.text")
            case ImagePart():
                builder.picture(part.image_url.url, f"{place}.image_url.url")
            case DrawPart():
                builder.draw(place)


def _add_reply(
    builder: DocumentBuilder, content: str, images: Sequence[ImagePart], param: str
) -> None:
    """Add a text with the pictures of a reply at their offsets."""
    placed = []
    for number, image in enumerate(images):
        offset = image.mmi.offset if image.mmi else None
        if offset is not None and offset > len(content):
            raise ApiError(
                400,
                "invalid_value",
                f"`{param}.images[{number}].mmi.offset` is {offset}, beyond the end of `content`, "
                f"which has {len(content)} characters"[:200],
                param=f"{param}.images[{number}].mmi.offset",
            )
        placed.append((len(content) if offset is None else offset, number))
    begun = 0
    for offset, number in sorted(placed):
        if offset > begun:
            builder.text(content[begun:offset], f"{param}.content")
        begun = offset
        url = images[number].image_url.url
        builder.picture(url, f"{param}.images[{number}].image_url.url")
    if content[begun:]:
        builder.text(content[begun:], f"{param}.content")
