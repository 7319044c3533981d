"""Contact sheet of drawn pictures: context, output and expected picture side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmi_train.evaluation.synthetic_tasks import Sample

_SCALE = 2
_MARGIN = 10
_TEXT = 40
_HEADING = 24
_RIGHT, _WRONG, _PAPER, _INK = (40, 150, 70), (200, 60, 50), (255, 255, 255), (40, 40, 40)


def contact_sheet(samples: Sequence[Sample], columns: int = 4) -> Image.Image:
    """Draw one cell per sample: the context picture (if any sample has one), the drawn one, framed
    green if it is right and red if not, the expected one, and the sentence below."""
    first = 0 if any(sample.context is not None for sample in samples) else 1
    side = samples[0].drawn.shape[0] * _SCALE
    width, height = (3 - first) * side + 3 * _MARGIN, side + _TEXT + 2 * _MARGIN
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, sample in enumerate(samples):
        left = _MARGIN + index % columns * width
        top = _MARGIN + index // columns * height
        shown = (sample.context, sample.drawn, sample.expected)[first:]
        for place, picture in enumerate(shown):
            if picture is None:
                continue
            corner = (left + place * (side + 4), top)
            sheet.paste(_enlarged(picture), corner)
            if picture is sample.drawn:
                frame = (corner[0] - 2, corner[1] - 2, corner[0] + side + 1, corner[1] + side + 1)
                pen.rectangle(frame, outline=_RIGHT if sample.correct else _WRONG, width=2)
        text = "\n".join(textwrap.wrap(sample.prompt, width=58 if first == 0 else 40)[:3])
        pen.multiline_text((left, top + side + 4), text, fill=_INK, spacing=1)
    return sheet


def grouped_contact_sheet(groups: Mapping[str, Sequence[Sample]]) -> Image.Image:
    """Contact sheets of several groups of samples below each other, each under its name; a group
    is one row."""
    sheets = {name: contact_sheet(group, len(group)) for name, group in groups.items()}
    width = max(sheet.width for sheet in sheets.values())
    height = sum(sheet.height + _HEADING for sheet in sheets.values())
    whole = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(whole)
    top = 0
    for name, sheet in sheets.items():
        pen.text((_MARGIN, top + 8), name, fill=_INK, font_size=15)
        whole.paste(sheet, (0, top + _HEADING))
        top += _HEADING + sheet.height
    return whole


def _enlarged(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((image.width * _SCALE, image.height * _SCALE), Image.Resampling.NEAREST)
