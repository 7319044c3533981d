"""Pictures that Pillow opens but does not read as they are meant, and what a program hands over."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from mmi_deploy.documents import document, images
from mmi_deploy.errors import DocumentError
from mmi_deploy.system.files import open_regular

RGB = np.random.default_rng(3).integers(0, 256, (5, 9, 3), np.uint8)
GREY = RGB[..., 0]
ORIENTATION, PHOTOMETRIC, BITS = 274, 262, 258


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    rows: bytes, size: tuple[int, int], bits: int, colour: int, *extra: tuple[bytes, bytes]
) -> bytes:
    """A PNG written by hand: `rows` packed, `size` (width, height), `extra` before the pixels."""
    height = size[1]
    step = len(rows) // height
    lines = b"".join(b"\0" + rows[step * y : step * (y + 1)] for y in range(height))
    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    middle = b"".join(chunk(kind, data) for kind, data in extra)
    pixels = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + pixels + chunk(b"IEND", b"")


def tiff(path: Path, image: Image.Image, compression: str | None, **tags: int) -> Path:
    """Save with tags given as their numbers' names: `orientation`, `photometric`, `bits`."""
    numbers = {"orientation": ORIENTATION, "photometric": PHOTOMETRIC, "bits": BITS}
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[numbers[name]] = value
    image.save(path, tiffinfo=info, **({"compression": compression} if compression else {}))
    return path


def turned(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Stored rows as a viewer shows them (EXIF 2.32, Orientation)."""
    flat = rgb if orientation < 5 else rgb.transpose(1, 0, 2)
    flips = {1: "", 2: "x", 3: "xy", 4: "y", 5: "", 6: "x", 7: "xy", 8: "y"}[orientation]
    flat = flat[:, ::-1] if "x" in flips else flat
    return flat[::-1] if "y" in flips else flat


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_deflate"], ids=["stored", "packed"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "LA", "1", "I;16"])
def test_a_turned_tiff_is_upright(
    tmp_path: Path, mode: str, compression: str | None, orientation: int
) -> None:
    if mode == "I;16":
        image, shown = Image.fromarray(GREY.astype(np.uint16) * 257), np.dstack([GREY] * 3)
    else:
        image = Image.fromarray(RGB).convert(mode)
        shown = np.asarray(image.convert("RGB"))
    path = tiff(tmp_path / "a.tif", image, compression, orientation=orientation)
    np.testing.assert_array_equal(images.read_rgb(path), turned(shown, orientation))
    with Image.open(path) as opened:  # as a program opens it and hands it over
        np.testing.assert_array_equal(images.as_rgb(opened), turned(shown, orientation))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"], ids=["stored", "packed"])
@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_white_are_refused(
    tmp_path: Path, mode: str, compression: str | None
) -> None:
    """Floats of 0 to 1 came out black, 32-bit numbers white."""
    path = tiff(tmp_path / "a.tif", Image.fromarray(GREY).convert(mode), compression)
    with pytest.raises(DocumentError, match=r"a\.tif stores numbers of 32 bits.* as PNG with 8"):
        images.read_rgb(path)
    with pytest.raises(DocumentError, match="that was given stores numbers of 32 bits"):
        document.Image(Image.fromarray(GREY).convert(mode))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"], ids=["stored", "packed"])
def test_16_bits_of_a_tiff_whose_zero_is_white(tmp_path: Path, compression: str | None) -> None:
    image = Image.fromarray(65535 - GREY.astype(np.uint16) * 257)
    path = tiff(tmp_path / "a.tif", image, compression, photometric=0)
    np.testing.assert_array_equal(images.read_rgb(path), np.dstack([GREY] * 3))


def test_12_bits_of_a_tiff_reach_white(tmp_path: Path) -> None:
    """Two pixels in three bytes, which no writer of Pillow's makes."""
    values = np.array([0, 4095, 2048, 16], np.uint16)
    packed = b"".join(
        bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in values.reshape(-1, 2).tolist()
    )
    tags = {256: 4, 257: 1, BITS: 12, 259: 1, PHOTOMETRIC: 1, 273: 8, 277: 1, 278: 1, 279: 6}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(packed))
    ifd = struct.pack("<H", len(tags)) + fields + bytes(4)
    (tmp_path / "a.tif").write_bytes(head + packed + ifd)
    assert images.read_rgb(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 255, 127, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white(tmp_path: Path, bits: int) -> None:
    """tRNS names it in the levels of the file (PNG 11.3.2.1): here the third, else the lowest."""
    transparent, other = (2 if bits > 1 else 1), 0
    levels = [transparent, other] * 4
    if bits == 16:
        rows = struct.pack(">8H", *levels)
    else:
        word = sum(level << bits * (7 - place) for place, level in enumerate(levels))
        rows = word.to_bytes(bits, "big")
    name = (b"tRNS", struct.pack(">H", transparent))
    (tmp_path / "a.png").write_bytes(png(rows, (8, 1), bits, 0, name))
    assert images.read_rgb(tmp_path / "a.png")[0, :, 0].tolist() == [255, 0] * 4


@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_colour_of_a_png_is_white(tmp_path: Path, bits: int) -> None:
    full = 2**bits - 1
    colours = [(full, 0, 0), (0, full, 0)]
    form = ">6B" if bits == 8 else ">6H"
    rows = struct.pack(form, *(level for colour in colours for level in colour))
    name = (b"tRNS", struct.pack(">3H", *colours[0]))
    (tmp_path / "a.png").write_bytes(png(rows, (2, 1), bits, 2, name))
    assert images.read_rgb(tmp_path / "a.png").tolist() == [[[255, 255, 255], [0, 255, 0]]]


def test_a_palette_with_transparency_is_on_white(tmp_path: Path) -> None:
    palette = (b"PLTE", bytes((10, 20, 30, 40, 50, 60, 200, 0, 0)))
    alphas = (b"tRNS", bytes((255, 0, 51)))
    (tmp_path / "a.png").write_bytes(png(bytes((0, 1, 2)), (3, 1), 8, 3, palette, alphas))
    assert images.read_rgb(tmp_path / "a.png")[0].tolist() == [
        [10, 20, 30],
        [255, 255, 255],
        [244, 204, 204],  # a fifth of the red on white
    ]


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_colours_are_on_white(mode: str) -> None:
    straight = Image.new(mode.upper(), (2, 2), (200, 0, 0, 51) if mode == "RGBa" else (200, 51))
    expected = images.as_rgb(straight).astype(int)
    assert np.abs(images.as_rgb(straight.convert(mode)) - expected).max() <= 3


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"])
def test_long_texts_of_a_png_are_left_out(tmp_path: Path, kind: bytes, place: str) -> None:
    """Drawing programs keep their own files there; Pillow takes one that unpacks to more than a
    megabyte for damage."""
    text = zlib.compress(bytes(5_000_000))
    data = {
        b"zTXt": b"Raw\0\0" + text,
        b"iTXt": b"Raw\0\1\0en\0\0" + text,
        b"iCCP": b"Raw\0\0" + text,
        b"tEXt": b"Raw\0" + b"x" * 70_000_000,
    }[kind]
    whole = png(RGB.tobytes(), (9, 5), 8, 2)
    at = whole.index(b"IDAT" if place == "before" else b"IEND") - 4
    (tmp_path / "a.png").write_bytes(whole[:at] + chunk(kind, data) + whole[at:])
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.png"), RGB)


def test_many_texts_of_a_png_cost_no_memory(tmp_path: Path) -> None:
    texts = chunk(b"zTXt", b"Raw\0\0" + zlib.compress(bytes(1_000_000))) * 200
    whole = png(RGB.tobytes(), (9, 5), 8, 2)
    at = whole.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(whole[:at] + texts + whole[at:])
    tracemalloc.start()
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.png"), RGB)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_short_texts_still_tell_how_a_png_lies(tmp_path: Path) -> None:
    """Some programs write the orientation as XMP."""
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    texts = (
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp.encode()),
        (b"zTXt", b"Raw\0\0" + zlib.compress(bytes(5_000_000))),
    )
    (tmp_path / "a.png").write_bytes(png(RGB.tobytes(), (9, 5), 8, 2, *texts))
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.png"), turned(RGB, 6))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_the_first_picture_of_several_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    path = tmp_path / f"a.{suffix}"
    more = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **more)
    assert images.read_rgb(path)[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_a_photo_with_broken_exif_is_read_as_it_is_stored(tmp_path: Path, exif: bytes) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (9, 5), (200, 0, 0)).save(whole, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(whole.getvalue())
    assert images.read_rgb(tmp_path / "a.jpg").shape == (5, 9, 3)


def test_a_picture_that_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(DocumentError, match=rf"{name}: Not a regular file"):
            images.read_rgb(tmp_path / name)
        with pytest.raises(OSError, match="Not a regular file"):
            open_regular(tmp_path / name)


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(10 * 2**30)  # takes no disk
    with pytest.raises(DocumentError, match="too large; expected at most 513 MB; got 10737 MB"):
        images.read_rgb(tmp_path / "a.png")


def test_a_program_gives_arrays_images_and_paths(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    lying = Image.fromarray(np.ascontiguousarray(np.rot90(RGB)))
    lying.getexif()[ORIENTATION] = 6
    given = (
        RGB,
        RGB[::-1][::-1],
        np.asfortranarray(RGB),
        RGB.view(np.memmap),
        Image.fromarray(RGB),
        Image.fromarray(np.dstack([RGB, np.full_like(GREY, 255)])),
        lying,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    )
    for source in given:
        np.testing.assert_array_equal(document.Image(source).rgb, RGB)
    for grey in (Image.fromarray(GREY), Image.fromarray(GREY.astype(np.uint16) * 257)):
        np.testing.assert_array_equal(document.Image(grey).rgb, np.dstack([GREY] * 3))


@pytest.mark.parametrize(
    ("source", "got"),
    [
        (RGB.astype(np.float32) / 255, r"float32 \[5, 9, 3\]"),
        (RGB.astype(np.int64), r"int64 \[5, 9, 3\]"),
        (GREY, r"uint8 \[5, 9\]"),
        (RGB[..., [0, 1, 2, 0]], r"uint8 \[5, 9, 4\]"),
        (RGB.transpose(2, 0, 1), r"uint8 \[3, 5, 9\]"),
        (RGB[None], r"uint8 \[1, 5, 9, 3\]"),
        (RGB[:0], r"uint8 \[0, 9, 3\]"),
        (RGB.tolist(), "list"),
        (b"\x89PNG", "bytes"),
        (None, "NoneType"),
    ],
    ids=lambda value: "" if isinstance(value, np.ndarray) else str(value)[:12],
)
def test_other_pictures_are_refused_at_the_door(source: object, got: str) -> None:
    expected = rf"expected a uint8 \[height, width, 3\] array, .*; got {got}\. "
    with pytest.raises(DocumentError, match=expected):
        document.Image(source)  # type: ignore[arg-type]
    with pytest.raises(DocumentError, match=expected):
        images.to_pixels(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "got"),
    [
        (("the red circle",), "str"),
        ((RGB,), "ndarray"),
        ((document.Text("a"), None), "NoneType"),
        ((document.Draw,), "type"),
    ],
)
def test_what_is_no_part_of_a_document_is_refused(parts: tuple[object, ...], got: str) -> None:
    for make in (document.document_of, lambda *given: document.Document(given)):
        with pytest.raises(DocumentError, match=f"expected a Text, an Image or a Draw; got {got}"):
            make(*parts)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "got"), [(5, "int"), (b"red", "bytes"), (None, "NoneType")])
def test_a_text_is_a_string(text: object, got: str) -> None:
    with pytest.raises(DocumentError, match=f"expected a string; got {got}"):
        document.Text(text)  # type: ignore[arg-type]
    if text is not None:
        with pytest.raises(DocumentError, match=f"expected a string; got {got}"):
            document.Image(RGB, alt=text)  # type: ignore[arg-type]


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(DocumentError, match="half a character"):
        document.Text("red \ud83d")
