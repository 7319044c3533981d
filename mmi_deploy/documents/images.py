"""Pictures: read from files, brought to the model's size, turned to pixels and back.

Letters: h height, w width in pixels. `rgb` is uint8 [h, w, 3]; `pixels` is float32 [3, h, w] in
[0, 1], as every graph takes and gives them.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mmi_deploy.errors import DocumentError

Rgb = NDArray[np.uint8]
Pixels = NDArray[np.float32]
Fit = Literal["crop", "squash"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a small file can unpack to gigabytes."""


def read_rgb(path: Path) -> Rgb:
    """Decode a picture whole, upright (EXIF orientation), transparent parts on white: [h, w, 3].

    Raises `DocumentError` when it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit comes below Pillow's warning
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image.size, path)
                upright = ImageOps.exif_transpose(image)
                return np.asarray(_opaque(upright))
    except Image.DecompressionBombError:  # before we could see its size
        most = 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS) // 1_000_000
        raise _too_large(path, f"more than {most} million") from None
    except UnidentifiedImageError:
        raise DocumentError(
            f"{path} is no picture that can be read",
            expected=", ".join(FORMATS),
            fix="save it again as PNG",
        ) from None
    except (DocumentError, MemoryError):
        raise
    except Exception as error:  # decoders stumble over damage in many ways
        if isinstance(error, OSError) and error.strerror:  # the system's own
            raise DocumentError(f"cannot read the picture {path}: {error.strerror}") from None
        raise DocumentError(
            f"the picture {path} is damaged ({error})", fix="replace the file"
        ) from None


def _check_size(size: tuple[int, int], path: Path) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width} x {height}")


def _too_large(path: Path, got: str) -> DocumentError:
    return DocumentError(
        f"the picture {path} is too large",
        expected=f"at most {MAX_PIXELS // 1_000_000} million pixels",
        got=got,
        fix="scale it down",
    )


def _opaque(image: Image.Image) -> Image.Image:
    """RGB; what is transparent becomes white."""
    if image.mode.startswith("I;16"):  # greys beyond 255 would all become white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def resize(rgb: Rgb, side: int, fit: Fit = "crop") -> Rgb:
    """To [side, side, 3], as the published data pipeline does.

    `crop`: while the shorter side is at least twice `side` the picture is halved with a box filter;
    then its shorter side is scaled to `side` bicubically and the middle is cut out. `squash` (the
    published grounding transform) scales both sides to `side` and gives up the proportions.
    """
    image = Image.fromarray(rgb)
    if fit == "squash":
        return np.asarray(_scale(image, (side, side), Image.Resampling.BICUBIC))
    while min(image.size) >= 2 * side:
        image = _scale(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    shorter = min(image.size)
    if max(image.size) > 4 * shorter:  # only the middle is kept: do not scale the rest
        left, top = (max((length - 4 * shorter) // 2, 0) for length in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    factor = side / shorter
    size = round(image.width * factor), round(image.height * factor)
    scaled = np.asarray(_scale(image, size, Image.Resampling.BICUBIC))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    return scaled[top : top + side, left : left + side]


def _scale(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    """Horizontally first, then vertically: Pillow rounds to 8 bits in between, and which axis it
    takes first by itself depends on its version."""
    width, height = size
    return image.resize((width, image.height), filter).resize((width, height), filter)


def to_pixels(rgb: Rgb) -> Pixels:
    """uint8 [h, w, 3] to float32 [3, h, w] in [0, 1]."""
    return np.ascontiguousarray(rgb.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def to_rgb(pixels: Pixels) -> Rgb:
    """float [3, h, w] to uint8 [h, w, 3]; values outside [0, 1] are clipped, rounding to nearest.

    Raises `ValueError` when a value is not finite: a picture of NaNs must not pass for a black one.
    """
    if not np.isfinite(pixels).all():
        raise ValueError("the pixels hold values that are not finite")
    scaled = np.clip(pixels, 0, 1).transpose(1, 2, 0) * 255
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8))


def to_png(rgb: Rgb) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
