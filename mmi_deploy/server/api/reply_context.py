"""Surroundings of a reply: model, rules of streams, encoding and keeping of pictures."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mmi_deploy.batching.job import JobStats
from mmi_deploy.documents.images import Rgb
from mmi_deploy.server.api.api_request import OutputFormat
from mmi_deploy.server.served_model import ServedModel
from mmi_deploy.server.settings import StreamRules

# Encodes a picture in another thread: format, quality or None.
Encode = Callable[[Rgb, OutputFormat, int | None], Awaitable[bytes]]

# Keeps an encoded picture of a MIME type; returns the path of its URL.
Store = Callable[[bytes, str], str]


@dataclass(frozen=True)
class ReplyContext:
    """Everything that a reply needs besides its request and the events.

    request_id: as in the header. created: Unix time. encode: a picture to a file, in a thread.
    store: an encoded picture under a URL, for the transport `url`. stats: of the document, known
    after the last event; None if the engine did not tell.
    """

    model: ServedModel
    rules: StreamRules
    request_id: str
    created: int
    encode: Encode
    store: Store
    stats: Callable[[], JobStats | None]
