"""The 64-pixel pictures from which the published code computes its FID."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Side of the pictures: the default that no caller overrides.
SIDE = 64


def small_pixels(rgb: np.ndarray) -> np.ndarray:
    """float32 [3, 64, 64] in 0..1 of a picture uint8 [height, width, 3]: the shorter side scaled to
    64 bicubically, and the centre cut out."""
    image = Image.fromarray(rgb)
    width, height = image.size
    longer = int(SIDE * max(width, height) / min(width, height))
    size = (SIDE, longer) if width <= height else (longer, SIDE)
    scaled = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (round((side - SIDE) / 2) for side in scaled.shape[:2])
    cut = scaled[top : top + SIDE, left : left + SIDE]
    return cut.transpose(2, 0, 1).astype(np.float32) / 255
