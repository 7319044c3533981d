"""Pictures: decode files, resize to the model's input, convert to and from pixel tensors.

`rgb` is uint8 [height, width, 3]; `pixels` is float32 [3, height, width] in [0, 1], the form of
every graph's inputs and outputs.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import open_regular

Rgb = NDArray[np.uint8]
Pixels = NDArray[np.float32]
Fit = Literal["crop", "squash"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

# Larger pictures are refused before they are decoded: a small file can unpack to gigabytes.
MAX_PIXELS = 64_000_000

# Larger files are refused before they are read: `MAX_PIXELS` of 64 bits, and room for metadata.
MAX_BYTES = 8 * MAX_PIXELS + 2**20

# Aspect ratio of a strip, which is cropped before it is scaled.
_STRIP = 32

# Bytes of text chunks and colour profiles that are kept of a PNG; Pillow refuses files with more.
_MOST_TEXT = 2**20

_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG = b"\x89PNG\r\n\x1a\n"


def read_rgb(path: Path) -> Rgb:
    """Decode a picture to [height, width, 3], upright (EXIF orientation), transparent parts white.

    Of an animation or of several pages the first is read. Raises `DocumentError` for a file that
    cannot be read or whose values have no meaning as colours.
    """
    with _refusals(path):
        # Pillow gets the open file, not its name: it maps named files, and for a rotated picture it
        # then reads rows of the wrong width.
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise DocumentError(
                    f"the picture {path} is too large",
                    expected=f"at most {MAX_BYTES // 1_000_000} MB",
                    got=f"{size // 1_000_000} MB",
                    fix="scale it down",
                )
            with Image.open(without_long_texts(file), formats=FORMATS) as image:
                return _rgb_of(image, path)


def as_rgb(picture: object) -> Rgb:
    """Convert a picture in memory to uint8 [height, width, 3].

    Accepts such an array, or an image of Pillow in any mode, which is converted as `read_rgb` does.
    Raises `DocumentError` for anything else.
    """
    name = "that was given"
    if isinstance(picture, Image.Image):
        file = str(getattr(picture, "filename", ""))
        if picture.format == "TIFF" and file and getattr(picture, "tile", None):
            return read_rgb(Path(file))  # not decoded yet: see `read_rgb`
        with _refusals(name):
            return _rgb_of(picture, name)
    if isinstance(picture, np.ndarray):
        got = f"{picture.dtype} {list(picture.shape)}"
        if picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
            if picture.size:
                return np.asarray(picture)
    else:
        got = type(picture).__name__
    raise DocumentError(
        f"the picture {name} has the wrong type or shape",
        expected="a uint8 [height, width, 3] array, an image of Pillow, or a path",
        got=got,
        fix="convert greys or RGBA with PIL.Image.fromarray; scale floats to 0...255 first",
    )


@contextmanager
def _refusals(path: Path | str) -> Iterator[None]:
    """Turn every error of reading the picture `path` into a `DocumentError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit is below that of Pillow's warning
            yield
    except Image.DecompressionBombError:  # raised before the size can be read
        most = 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS) // 1_000_000
        raise _too_large(path, f"more than {most} million") from None
    except UnidentifiedImageError:
        raise DocumentError(
            f"{path} is not a picture that can be read",
            expected=", ".join(FORMATS),
            fix="save it again as PNG",
        ) from None
    except (DocumentError, MemoryError):
        raise
    except Exception as error:  # decoders raise many types for damaged files
        if isinstance(error, OSError) and error.strerror:  # the system's own
            raise DocumentError(f"cannot read the picture {path}: {error.strerror}") from None
        raise DocumentError(
            f"the picture {path} is damaged ({error})", fix="replace the file"
        ) from None


def without_long_texts(file: BinaryIO) -> BinaryIO:
    """The file, or if it is a PNG with more text than Pillow accepts, a copy without that text."""
    left_out = []
    if file.read(len(_PNG)) == _PNG:
        room = _MOST_TEXT
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            begun = file.tell()
            if kind in _TEXTS:
                room -= length if length > room else _text_size(kind, file.read(length), room)
                if room < 0:
                    room = 0
                    left_out.append((begun - 8, begun + length + 4))
            file.seek(begun + length + 4)
    file.seek(0)
    if not left_out:
        return file
    whole = file.read()
    edges = [0, *(edge for place in left_out for edge in place), len(whole)]
    pieces = [whole[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return io.BytesIO(b"".join(pieces))


def _text_size(kind: bytes, text: bytes, most: int) -> int:
    """Uncompressed size of a text chunk of a PNG in bytes, at most `most` + 1."""
    _, _, rest = text.partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\1"):
        return len(text)
    packed = rest[1:] if kind != b"iTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(packed, most + 1))
    except zlib.error:
        return len(text)  # damaged: Pillow reports it


def _check_size(size: tuple[int, int], path: Path | str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _too_large(path, f"{width} x {height}")


def _too_large(path: Path | str, got: str) -> DocumentError:
    return DocumentError(
        f"the picture {path} is too large",
        expected=f"at most {MAX_PIXELS // 1_000_000} million pixels",
        got=got,
        fix="scale it down",
    )


def _rgb_of(image: Image.Image, path: Path | str) -> Rgb:
    _check_size(image.size, path)
    if image.mode in ("I", "F"):
        raise DocumentError(
            f"the picture {path} stores numbers of 32 bits, and not which of them is white",
            expected="colours of 8 bits, or of 16",
            fix="save it again as PNG with 8 bits",
        )
    stored = _stored_as(image)
    tags = getattr(image, "tag_v2", {})
    upright = ImageOps.exif_transpose(image)
    transparent = upright.info.get("transparency")
    if upright.mode.startswith("I;16"):  # greys beyond 255 would all become white
        grey = np.asarray(upright).astype(np.uint32)
        white = 2 ** int(tags[_BITS][0]) - 1 if _BITS in tags else 65535  # 12 bits in some TIFFs
        eight = (grey * 255 // white).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts this for 8 bits alone
            eight = 255 - eight
        if isinstance(transparent, int):
            eight[grey == transparent] = 255
        upright = Image.fromarray(eight)
    elif isinstance(transparent, int) and stored in _LEVELS:  # counted in the levels of the file
        upright.info["transparency"] = transparent * 255 // _LEVELS[stored]
    elif isinstance(transparent, tuple) and stored == "RGB;16B":
        upright.info["transparency"] = tuple(level >> 8 for level in transparent)
    return np.asarray(_opaque(upright))


# TIFF tags BitsPerSample and PhotometricInterpretation, and a value of the latter.
_BITS, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0

# White level of PNG greys with fewer than 8 bits.
_LEVELS = {"1": 1, "L;2": 3, "L;4": 15}


def _stored_as(image: Image.Image) -> str:
    """Raw mode, Pillow's name of the pixel layout, of a PNG that is not decoded yet; else empty."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if image.format == "PNG" and tiles else ""


def _opaque(image: Image.Image) -> Image.Image:
    """Convert to RGB; transparent parts become white."""
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


_PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}


def resize(rgb: Rgb, side: int, fit: Fit = "crop") -> Rgb:
    """Resize to [side, side, 3] as the published data pipeline does.

    `crop`: halve the picture with a box filter while its shorter side is at least twice `side`,
    scale its shorter side to `side` bicubically, and crop the centre. `squash` (the published
    grounding transform): scale both sides to `side` without keeping the aspect ratio.
    """
    image = Image.fromarray(rgb)
    if fit == "squash":
        return np.asarray(_scale(image, (side, side), Image.Resampling.BICUBIC))
    while min(image.size) >= 2 * side:
        image = _scale(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    shorter = min(image.size)
    # Only the centre is kept: of a long strip the rest is not scaled. Shorter ones are scaled
    # whole, because cropping first shifts the filter by a fraction of a pixel.
    if max(image.size) > _STRIP * shorter:
        left, top = (max((length - _STRIP * shorter) // 2, 0) for length in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    factor = side / shorter
    size = round(image.width * factor), round(image.height * factor)
    scaled = np.asarray(_scale(image, size, Image.Resampling.BICUBIC))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    return scaled[top : top + side, left : left + side]


def _scale(image: Image.Image, size: tuple[int, int], filter: Image.Resampling) -> Image.Image:
    """Scale horizontally, then vertically.

    Pillow rounds to 8 bits in between, and the order of the axes in one call depends on its
    version.
    """
    width, height = size
    return image.resize((width, image.height), filter).resize((width, height), filter)


def to_pixels(rgb: Rgb) -> Pixels:
    """Convert uint8 [height, width, 3] to float32 [3, height, width] in [0, 1].

    Raises `DocumentError` for anything else.
    """
    rgb = as_rgb(rgb)
    return np.ascontiguousarray(rgb.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def to_rgb(pixels: Pixels) -> Rgb:
    """Convert float [3, height, width] to uint8 [height, width, 3], clipped and rounded to nearest.

    Raises `ValueError` if a value is not finite: a picture of NaNs must not become a black one.
    """
    if not np.isfinite(pixels).all():
        raise ValueError("the pixels hold values that are not finite")
    scaled = np.clip(pixels, 0, 1).transpose(1, 2, 0) * 255
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8))


def to_png(rgb: Rgb) -> bytes:
    """Encode a picture as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
