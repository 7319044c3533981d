"""Contact sheet of drawn pictures: context, output and expected picture side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmi_train.evaluation.synthetic_tasks import Sample

_SCALE = 2
_MARGIN = 10
_TEXT = 40
_RIGHT, _WRONG, _PAPER, _INK = (40, 150, 70), (200, 60, 50), (255, 255, 255), (40, 40, 40)


def contact_sheet(samples: Sequence[Sample], columns: int = 4) -> Image.Image:
    """Draw one cell per sample: the context picture (if any), the drawn one, framed green if its
    whole scene is right and red if not, the expected one, and the sentence below."""
    side = samples[0].drawn.shape[0] * _SCALE
    width, height = 3 * side + 3 * _MARGIN, side + _TEXT + 2 * _MARGIN
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, sample in enumerate(samples):
        left = _MARGIN + index % columns * width
        top = _MARGIN + index // columns * height
        for place, picture in enumerate((sample.context, sample.drawn, sample.expected)):
            if picture is None:
                continue
            corner = (left + place * (side + 4), top)
            sheet.paste(_enlarged(picture), corner)
            if place == 1:
                frame = (corner[0] - 2, corner[1] - 2, corner[0] + side + 1, corner[1] + side + 1)
                pen.rectangle(frame, outline=_RIGHT if sample.correct else _WRONG, width=2)
        text = "\n".join(textwrap.wrap(sample.prompt, width=58)[:3])
        pen.multiline_text((left, top + side + 4), text, fill=_INK, spacing=1)
    return sheet


def _enlarged(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((image.width * _SCALE, image.height * _SCALE), Image.Resampling.NEAREST)
