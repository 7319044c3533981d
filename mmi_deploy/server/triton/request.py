"""Requests to the model: JSON to a document and its options."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, fields

from mmi_deploy.documents.document import Document, check_pictures
from mmi_deploy.documents.files import document_of_json
from mmi_deploy.documents.images import Rgb, decode_rgb
from mmi_deploy.documents.json_lines import document_line
from mmi_deploy.errors import DocumentError
from mmi_deploy.runtime.options import GenerationOptions, options_of
from mmi_deploy.server.settings import RequestLimits

# Options that a request may have. Events have no place for log probabilities.
OPTIONS = frozenset(field.name for field in fields(GenerationOptions)) - {"logprobs"}

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class ModelRequest:
    """A document to continue. id: the request's own, or 1."""

    id: str | int
    document: Document
    options: GenerationOptions


def read_request(data: bytes, images: int, limits: RequestLimits) -> ModelRequest:
    """Read a request: a line of a JSONL (`documents/json_lines.py`) whose pictures are data URLs.

    images: most pictures, given and to be drawn. Each limit is checked before what it limits is
    decoded. Raises `MmiError`.
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
    pictures = _Pictures(limits)
    return ModelRequest(line.id, document_of_json(parts, pictures.decode), options)


class _Pictures:
    """Decodes the pictures of a document, and counts them for errors."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits, self._count = limits, 0

    def decode(self, url: str) -> Rgb:
        """Pixels of a data URL. Raises `DocumentError`."""
        self._count += 1
        name = f"picture {self._count} of the document"
        start = _DATA_URL.match(url)
        if start is None:
            raise DocumentError(
                f"{name} is not a data URL", expected="data:image/png;base64,...", got=url[:40]
            )
        # Four characters of base64 are three bytes.
        _check(name, 3 * (len(url) - start.end()) // 4, self._limits.image_bytes, "bytes")
        try:
            data = base64.b64decode(url[start.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise DocumentError(f"{name} is not base64") from None
        return decode_rgb(data, name)


def _check(name: str, size: int, most: int, unit: str) -> None:
    if size > most:
        raise DocumentError(f"{name} is too large", expected=f"at most {most} {unit}", got=size)
