"""IoU of boxes, and the box that an answer names as `(x1,y1)(x2,y2)` in thousandths of the sides.

Source: the published evaluation of referring expressions, with the usual threshold of 0.5.
"""

from __future__ import annotations

import math
import re

# x1, y1, x2, y2.
Box = tuple[float, float, float, float]

# Coordinates of answers run from 0 to this, along either side.
SCALE = 999

# IoU from which a box counts; rounding must not decide about a box at exactly one half.
THRESHOLD, ROUNDING = 0.5, 1e-9

NO_BOX: Box = (0.0, 0.0, 0.0, 0.0)

# Characters in which a box is looked for: the search takes their square.
_LONGEST = 10_000

_PAIRS = re.compile(r"\((.*?)\)\((.*?)\)")


def parse_box(answer: str) -> Box:
    """The first box in an answer; `NO_BOX` if it holds none that can be read."""
    found = _PAIRS.search(answer[:_LONGEST])
    if found is None:
        return NO_BOX
    try:
        (x1, y1), (x2, y2) = ([float(part) for part in pair.split(",")] for pair in found.groups())
    except ValueError:  # another number of coordinates, or no numbers
        return NO_BOX
    return x1, y1, x2, y2


def in_pixels(box: Box, width: float, height: float) -> Box:
    """A box in thousandths of the sides, in pixels of a picture."""
    x, y = width / SCALE, height / SCALE
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; NaN if both are empty, or a coordinate is NaN."""
    if any(math.isnan(side) for side in (*a, *b)):
        return math.nan
    across = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    down = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = _area(a) + _area(b) - across * down
    return across * down / union if union else math.nan


def counts(overlap: float) -> bool:
    """True for an IoU of at least `THRESHOLD`."""
    return overlap >= THRESHOLD - ROUNDING  # never of NaN


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
