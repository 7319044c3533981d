"""Training documents: texts and images in order, with what the model learns of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TextPart:
    """A piece of text. `learn`: its tokens carry loss."""

    text: str
    learn: bool


@dataclass(frozen=True)
class ImagePart:
    """A picture, uint8 [height, width, 3]. `draw`: the model learns to draw it from what precedes
    it."""

    image: np.ndarray
    draw: bool


Part = TextPart | ImagePart
