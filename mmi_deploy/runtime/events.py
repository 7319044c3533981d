"""What `generate` reports, in the order in which it happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.timings import Timings

Reason = Literal["end", "stop", "max_tokens", "max_images", "context", "cancelled"]
"""end: the model ended the document. stop: a stop text came. max_tokens, max_images: the next one
would be too many. context: it would not fit. cancelled: the caller wanted no more."""


@dataclass(frozen=True)
class TextDelta:
    """Text that follows what came before."""

    text: str


@dataclass(frozen=True)
class ImageStarted:
    """Picture `index` of the document, given ones counted, will be drawn in `steps` steps."""

    index: int
    steps: int


@dataclass(frozen=True)
class ImageProgress:
    """`step` of `of` steps are done."""

    index: int
    step: int
    of: int


@dataclass(frozen=True)
class ImageDone:
    """The picture, uint8 [h, w, 3]."""

    index: int
    rgb: Rgb


@dataclass(frozen=True)
class Finished:
    """The last event: why it ended, what was written and drawn, and how long the stages took."""

    reason: Reason
    tokens: int
    images: int
    timings: Timings


Event = TextDelta | ImageStarted | ImageProgress | ImageDone | Finished
