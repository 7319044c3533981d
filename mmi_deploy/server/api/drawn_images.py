"""Drawn pictures in replies of Responses and Images: their size, and previews."""

from __future__ import annotations

from mmi_deploy.documents.images import Rgb
from mmi_deploy.server.api.api_request import ApiRequest
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.picture_urls import encoded
from mmi_deploy.server.api.reply_context import ReplyContext
from mmi_deploy.server.served_model import ServedModel

# Bytes of a line of a stream besides the base64 of a picture, at most.
_AROUND = 512


def size_of(model: ServedModel) -> str:
    """Size of drawn pictures, as `512x512`."""
    return f"{model.drawn_side}x{model.drawn_side}"


def check_size(size: str | None, model: ServedModel, param: str) -> None:
    """Raise `ApiError` for a size that the model does not draw."""
    if size not in (None, "auto", size_of(model)):
        raise ApiError(
            400,
            "unsupported_value",
            f"`{param}` must be `auto` or `{size_of(model)}`, the size of the model's pictures",
            param=param,
        )


def base64_room(context: ReplyContext) -> int:
    """Characters of base64, in whole groups of four, that a line of a stream has room for."""
    return max(context.rules.event_bytes - _AROUND, 4) // 4 * 4


async def preview_of(rgb: Rgb, request: ApiRequest, context: ReplyContext) -> tuple[str, str]:
    """Base64 of a preview, and its size.

    Halved until a line of the stream has room for it, unless pictures are sent inline.
    """
    while True:
        text = await encoded(rgb, request, context)
        height, width = rgb.shape[:2]
        fits = len(text) <= base64_room(context)
        if fits or request.transport == "inline" or min(height, width) == 1:
            return text, f"{width}x{height}"
        rgb = rgb[::2, ::2]
