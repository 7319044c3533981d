"""Drawn pictures as URLs: a data URL, or the path under which the server keeps the file."""

from __future__ import annotations

import base64
from collections.abc import Iterator

from mmi_deploy.documents.images import Rgb
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.reply_context import ReplyContext

# A piece is at least so long, also where a line leaves less room: pictures must come to an end.
_LEAST = 64


def mime_type(output_format: str) -> str:
    """MIME type of a format of pictures."""
    return f"image/{output_format}"


async def encoded(rgb: Rgb, request: ApiRequest, context: ReplyContext) -> str:
    """Encode a picture as the request asks, in base64."""
    data = await context.encode(rgb, request.output_format, request.output_compression)
    return base64.b64encode(data).decode()


async def picture_url(rgb: Rgb, request: ApiRequest, context: ReplyContext) -> str:
    """URL of a picture, encoded as the request asks."""
    mime = mime_type(request.output_format)
    if request.transport == "url":
        data = await context.encode(rgb, request.output_format, request.output_compression)
        return context.store(data, mime)
    return f"data:{mime};base64,{await encoded(rgb, request, context)}"


def chunked(text: str, room: int) -> Iterator[str]:
    """Pieces of `text` of at most `room` characters."""
    size = max(room, _LEAST)
    for start in range(0, len(text), size):
        yield text[start : start + size]
