"""A request as the engine takes it, and what its reply must look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmi_deploy.documents.document import Document
from mmi_deploy.runtime.options import GenerationOptions
from mmi_deploy.server.api.usage import PromptUsage

# inline: a picture is one data URL. chunked: a data URL in pieces that fit a line of
# `StreamRules.event_bytes`. url: the path under which the server keeps the picture for a while.
Transport = Literal["inline", "chunked", "url"]

OutputFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """A request that was read and fits the model. Endpoints add fields of their own.

    document: with pictures at the model's size. options: with the seed that was given, or one that
    was drawn. max_seconds: until the request is ended. stream: send events, not one reply.
    output_compression: quality of JPEG and WebP, 0 to 100; None for lossless WebP and for the
    default of JPEG. include_usage: end a stream with the usage. continuous_usage: and put it into
    every event. progress: send the steps of pictures, where the endpoint has no events for them.
    """

    document: Document
    options: GenerationOptions
    prompt_usage: PromptUsage
    max_seconds: float
    stream: bool = False
    transport: Transport = "inline"
    output_format: OutputFormat = "png"
    output_compression: int | None = None
    include_usage: bool = False
    continuous_usage: bool = False
    progress: bool = False

    @property
    def previews(self) -> int:
        """Number of previews of each picture."""
        return self.options.previews

    @property
    def requests(self) -> tuple[ApiRequest, ...]:
        """Requests of one document each, which the engine gets; several for several pictures."""
        return (self,)
