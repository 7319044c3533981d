"""Conversion between uint8 pictures and float pixels.

Letters: n encoded images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmi_deploy.documents.images import resize


def pixels_from_images(images: Sequence[np.ndarray]) -> Tensor:
    """Convert uint8 pictures [height, width, 3] to float pixels [n, 3, height, width] in [0, 1],
    channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)


def pixels_at(images: Sequence[np.ndarray], side: int) -> Tensor:
    """Resize uint8 pictures of any size as the runtime does, and convert them to pixels
    [n, 3, side, side]."""
    fitting = [
        image if image.shape[:2] == (side, side) else resize(image, side) for image in images
    ]
    return pixels_from_images(fitting)


def images_from_pixels(pixels: Tensor) -> list[np.ndarray]:
    """Convert pixels [n, 3, height, width] in [0, 1] to uint8 pictures [height, width, 3], rounded
    to the nearest value."""
    return list(
        pixels.float()
        .clamp(0, 1)
        .mul(255)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )
