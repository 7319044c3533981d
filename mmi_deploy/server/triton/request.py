"""Requests to the model: JSON to a document and its options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import count

from mmi_deploy.documents.document import Document, check_pictures
from mmi_deploy.documents.files import document_of_json
from mmi_deploy.documents.images import Rgb
from mmi_deploy.documents.json_lines import document_line
from mmi_deploy.errors import DocumentError
from mmi_deploy.runtime.options import GenerationOptions, options_of
from mmi_deploy.server.api.pictures import PictureReader
from mmi_deploy.server.settings import RequestLimits

# Options that a request may have. Events have no place for log probabilities.
OPTIONS = frozenset(field.name for field in fields(GenerationOptions)) - {"logprobs"}


@dataclass(frozen=True)
class ModelRequest:
    """A document to continue. id: the request's own, or 1."""

    id: str | int
    document: Document
    options: GenerationOptions


def read_request(data: bytes, side: int, images: int, limits: RequestLimits) -> ModelRequest:
    """Read a request: a line of a JSONL (`documents/json_lines.py`) whose pictures are data URLs.

    side: to which pictures are resized, in pixels. images: most of them, given and to be drawn.
    Each limit is checked before what it limits is decoded. Raises `MmiError` or `ApiError`.
    """
    _check("the request", len(data), limits.body_bytes, "bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise DocumentError("the request is not UTF-8 text") from None
    line = document_line(text, 1, OPTIONS)
    parts = line.parts if isinstance(line.parts, list) else []
    _check("the document", len(parts), limits.parts, "parts")
    entries = [part for part in parts if isinstance(part, dict)]
    check_pictures(sum("image" in part or "draw" in part for part in entries), images)
    texts = [part["text"] for part in entries if isinstance(part.get("text"), str)]
    _check("the text of the document", sum(map(len, texts)), limits.text_bytes, "characters")
    options = options_of(line.options)
    pictures, numbers = PictureReader(side, limits), count(1)

    def pixels(url: str) -> Rgb:
        return pictures.of_url(url, f"image {next(numbers)}")

    return ModelRequest(line.id, document_of_json(parts, pixels), options)


def _check(name: str, size: int, most: int, unit: str) -> None:
    if size > most:
        raise DocumentError(f"{name} is too large", expected=f"at most {most} {unit}", got=size)
