"""Samples of a data set: a training document with its answers, and samples that are left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from mmi_deploy.documents.images import Fit
from mmi_deploy.errors import DocumentError
from mmi_train.data.document import TextPart
from mmi_train.data.readers.pictures import Picture

# Box in pixels of the picture: left, top, right, bottom.
Box = tuple[float, float, float, float]


class Skipped(DocumentError):
    """A sample that a set's rules, or a picture that cannot be read, leave out. `reason`: what
    samples are counted by. `detail`: which one, or why. `by_rule`: its files are in order."""

    def __init__(self, reason: str, detail: str = "", *, by_rule: bool = False) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.by_rule = by_rule


@dataclass(frozen=True)
class PicturePart:
    """A picture that is decoded when it is asked for. `learn`: the model learns to draw it. `box`:
    the region that the sample is about. `fit`: its resizing to the encoder's square."""

    picture: Picture
    learn: bool = False
    box: Box | None = None
    fit: Fit = "crop"


SamplePart = TextPart | PicturePart


@dataclass(frozen=True)
class Sample:
    """One sample. `id`: the set's own id of the question or picture. `answers`: all references,
    also of a sample that learns none. `about`: what scoring takes besides, such as `question_type`
    or `options`, by the names of the set's files."""

    id: str | int
    parts: tuple[SamplePart, ...]
    answers: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[SamplePart, ...]:
        """Parts that the model is given in an evaluation: those before the first that is
        learned."""
        return tuple(takewhile(lambda part: not part.learn, self.parts))

    @property
    def pictures(self) -> list[PicturePart]:
        return [part for part in self.parts if isinstance(part, PicturePart)]


def joined(parts: Sequence[SamplePart]) -> tuple[SamplePart, ...]:
    """Parts of a document: neighbouring texts of one kind joined, whitespace next to pictures and
    at both ends left out, as `mmi generate` and the published tokenizer do."""
    runs: list[SamplePart] = []
    for part in parts:
        last = runs[-1] if runs else None
        if isinstance(part, TextPart) and isinstance(last, TextPart) and last.learn == part.learn:
            runs[-1] = TextPart(last.text + part.text, part.learn)
        else:
            runs.append(part)
    found: list[SamplePart] = []
    for index, part in enumerate(runs):
        if isinstance(part, TextPart):
            text = part.text
            if index == 0 or isinstance(runs[index - 1], PicturePart):
                text = text.lstrip()
            if index == len(runs) - 1 or isinstance(runs[index + 1], PicturePart):
                text = text.rstrip()
            if not text:
                continue
            part = TextPart(text, part.learn)
        found.append(part)
    return tuple(found)
