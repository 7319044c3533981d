"""Check of a data set: samples counted, those left out by reason, the first documents."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from PIL import Image, ImageDraw

from mmi_train.data.document import TextPart
from mmi_train.data.readers.data_set import DataSet, picture_of
from mmi_train.data.readers.folder import MISSING
from mmi_train.data.readers.pictures import FilePicture, Picture
from mmi_train.data.readers.sample import PicturePart, Sample, Skipped

# Pictures whose state is remembered.
_REMEMBERED = 2**16

# Samples between two remarks of progress.
_EVERY = 10_000


@dataclass
class Report:
    """Result of `check_set`. `skipped`: count of each reason; `examples`: its first place."""

    name: str
    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    documents: list[Sample] = field(default_factory=list)

    def skip(self, reason: Skipped, index: int) -> None:
        self.skipped[reason.reason] += 1
        self.examples.setdefault(reason.reason, reason.detail or f"sample {index}")

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "samples": self.samples,
            "skipped": dict(self.skipped.most_common()),
            "documents": [document_json(sample) for sample in self.documents],
        }


def check_set(
    data: DataSet[Any],
    show: int,
    *,
    decode: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Go through all samples of a set; keep the first `show`. Without `decode`, pictures are looked
    for but not opened."""
    report = Report(data.folder.name, skipped=Counter(data.skipped), examples=dict(data.examples))
    # Many sets ask several questions about a picture.
    file_flaw = lru_cache(maxsize=_REMEMBERED)(partial(_flaw, decode=decode))
    for index in range(len(data)):
        if index % _EVERY == 0:
            progress(f"sample {index} of {len(data)}")
        try:
            sample = data.sample(index)
            for part in sample.pictures:
                if isinstance(part.picture, FilePicture):
                    flaw = file_flaw(part.picture)
                else:
                    flaw = _flaw(part.picture, decode=decode)
                if flaw is not None:
                    raise flaw
        except Skipped as reason:
            report.skip(reason, index)
            continue
        report.samples += 1
        if len(report.documents) < show:
            report.documents.append(sample)
    return report


def _flaw(picture: Picture, *, decode: bool) -> Skipped | None:
    """Reason to leave a picture out."""
    try:
        if decode:
            picture_of(PicturePart(picture))
        elif not picture.exists():
            raise Skipped(MISSING, picture.name)
    except Skipped as reason:
        return reason
    return None


def document_json(sample: Sample) -> dict[str, Any]:
    """A document as JSON: its parts, and its answers if it has any."""
    found: dict[str, Any] = {"parts": [_part_json(part) for part in sample.parts]}
    if sample.answers:
        found["answers"] = list(sample.answers)
    return found


def _part_json(part: TextPart | PicturePart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"text": part.text, "learn": part.learn}
    found: dict[str, Any] = {"image": part.picture.name}
    if part.box is not None:
        found["box"] = list(part.box)
    return found


_SIDE, _MARGIN, _TEXT, _COLUMNS = 160, 10, 90, 4
_LINES = 5  # of the text below the pictures
_PAPER, _INK, _LEARNED, _BOX = (255, 255, 255), (40, 40, 40), (40, 150, 70), (230, 60, 40)


def contact_sheet(samples: list[Sample]) -> Image.Image:
    """Draw a row for each document: its pictures with their boxes, framed green where the model
    learns to draw them, and its text."""
    most = min(max((len(sample.pictures) for sample in samples), default=1), _COLUMNS)
    width = max(most * (_SIDE + _MARGIN), 4 * _SIDE) + _MARGIN
    rows = [-(-max(len(sample.pictures), 1) // _COLUMNS) for sample in samples]
    heights = [count * (_SIDE + _MARGIN) + _TEXT for count in rows]
    sheet = Image.new("RGB", (width, sum(heights) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = _MARGIN
    for sample, count, height in zip(samples, rows, heights, strict=True):
        for index, part in enumerate(sample.pictures):
            left = _MARGIN + index % _COLUMNS * (_SIDE + _MARGIN)
            corner = left, top + index // _COLUMNS * (_SIDE + _MARGIN)
            try:
                image = Image.fromarray(picture_of(part))
            except Skipped:  # not decoded before, with --quick: its place stays empty
                continue
            scale = min(_SIDE / image.width, _SIDE / image.height)
            size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
            sheet.paste(image.resize(size), corner)
            if part.box is not None:
                box = [corner[axis % 2] + value * scale for axis, value in enumerate(part.box)]
                pen.rectangle(box, outline=_BOX, width=2)
            if part.learn:
                frame = (corner[0] - 2, corner[1] - 2, corner[0] + size[0], corner[1] + size[1])
                pen.rectangle(frame, outline=_LEARNED, width=3)
        text = "".join(_shown(part) for part in sample.parts)
        columns = width // 6 - 4
        text = f"{sample.id}: {text}"[: 4 * _LINES * columns]  # wrapping takes as long as the text
        lines = textwrap.wrap(text, width=columns)[:_LINES]
        below = top + count * (_SIDE + _MARGIN)
        pen.multiline_text((_MARGIN, below), "\n".join(lines), fill=_INK, spacing=2)
        top += height
    return sheet


def _shown(part: TextPart | PicturePart) -> str:
    if isinstance(part, PicturePart):
        return " [picture] "
    return f"«{part.text}»" if part.learn else part.text


def document_text(sample: Sample) -> str:
    """A document on one line, learned text in «guillemets»."""
    pieces = []
    for part in sample.parts:
        if isinstance(part, TextPart):
            pieces.append(_shown(part))
        else:
            box = f" box {list(part.box)}" if part.box is not None else ""
            pieces.append(f"[{part.picture.name}{box}{', drawn' if part.learn else ''}]")
    return " ".join(" ".join(pieces).split())
