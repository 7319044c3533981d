"""Events that `generate` yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmi_deploy.documents.images import Rgb
from mmi_deploy.runtime.sampling import Sampled
from mmi_deploy.runtime.timings import Timings

# end: the model ended the document. stop: a stop text was written. max_tokens, max_images: the
# limit is reached. context: the next token or picture does not fit. cancelled: by the caller.
# deadline: its time is over.
Reason = Literal["end", "stop", "max_tokens", "max_images", "context", "cancelled", "deadline"]


@dataclass(frozen=True)
class TextDelta:
    """Text to append to the text so far.

    logprobs: tokens sampled since the event before, if the options ask for log probabilities. Text
    may be held back, so that it is not always the text of these tokens. tokens: text tokens written
    so far, those whose text is held back included.
    """

    text: str
    logprobs: tuple[Sampled, ...] = ()
    tokens: int = 0


@dataclass(frozen=True)
class ImageStarted:
    """Start of a picture. index: among all images of the document, given ones included. steps:
    number of denoising steps."""

    index: int
    steps: int


@dataclass(frozen=True)
class ImageProgress:
    """Progress of a picture: `step` of `of` denoising steps are done.

    preview: what the picture will be, as far as it is known, uint8 [side, side, 3] with the side of
    the latents; after the steps that `GenerationOptions.previews` selects, otherwise None.
    """

    index: int
    step: int
    of: int
    preview: Rgb | None = None


@dataclass(frozen=True)
class ImageDone:
    """A finished picture. rgb: uint8 [height, width, 3]."""

    index: int
    rgb: Rgb


@dataclass(frozen=True)
class Finished:
    """Last event. tokens: text tokens written. images: pictures drawn."""

    reason: Reason
    tokens: int
    images: int
    timings: Timings


Event = TextDelta | ImageStarted | ImageProgress | ImageDone | Finished
