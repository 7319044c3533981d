"""Pictures of requests: limits before decoding, strict base64, and messages that tell nothing."""

from __future__ import annotations

import base64
import io
import random
import re
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from deploy.server.api.served import data_url, file_of, random_picture
from mmi_deploy.documents.images import resize
from mmi_deploy.server.api.errors import ApiError
from mmi_deploy.server.api.pictures import PictureReader
from mmi_deploy.server.settings import RequestLimits
from mmi_deploy.system.process_memory import memory_bytes

SIDE = 64
PATH = re.compile(r"(?<!\w)/\w|\\|0x[0-9a-f]{6,}|<|object at")


def reader(**limits: int) -> PictureReader:
    return PictureReader(SIDE, RequestLimits(**limits))


def refused(url: str, *, code: str, **limits: int) -> ApiError:
    with pytest.raises(ApiError) as caught:
        reader(**limits).of_url(url, "messages[0].content[1].image_url.url")
    error = caught.value
    assert (error.status, error.code) == (400, code)
    assert error.param == "messages[0].content[1].image_url.url"
    assert not PATH.search(error.message) and len(error.message) < 300
    if "," in url and len(url) > 100:
        assert url.split(",", 1)[1][:24] not in error.message
    return error


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_formats_are_read_by_their_content_and_resized(kind: str) -> None:
    file = file_of(random_picture(1, 200, 90), kind)
    decoded = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    found = reader().of_url(data_url(file, "image/anything"), "x")
    assert np.array_equal(found, resize(decoded, SIDE))


def test_transparent_parts_are_white_and_rotations_are_applied() -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 0)).save(clear, "PNG")
    assert (reader().of_url(data_url(clear.getvalue()), "x") == 255).all()
    rgb = random_picture(2, SIDE, SIDE)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(rgb).save(turned, "PNG", exif=exif)
    assert np.array_equal(reader().of_url(data_url(turned.getvalue()), "x"), np.rot90(rgb, -1))


def test_bare_base64_is_the_same_picture() -> None:
    file = file_of(random_picture(3, 64, 64))
    both = reader()
    by_url, bare = both.of_url(data_url(file), "x"), both.of_base64(data_url(file)[22:], "x")
    assert np.array_equal(by_url, bare)


def test_equal_pictures_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    real = Image.open

    def count(*args: object, **options: object) -> Image.Image:
        opened.append(args)
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", count)
    url, one = data_url(file_of(random_picture(4))), reader()
    assert np.array_equal(one.of_url(url, "a"), one.of_url(url, "b")) and len(opened) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:40] + "\n" + text[40:],
        lambda text: text[:40] + " " + text[40:],
        lambda text: text + "\r\n",
        lambda text: text.rstrip("=") if text.endswith("=") else text[:-1],
        lambda text: text + "====",
        lambda text: text.replace("/", "_").replace("+", "-"),
        lambda text: text[:40] + "é" + text[41:],
        lambda text: text[:40] + "=" + text[41:],
        lambda text: text[:40] + "%2B" + text[43:],
    ],
)
def test_base64_is_strict(change: Callable[[str], str]) -> None:
    text = base64.b64encode(file_of(random_picture(5, 31, 33)) + b"x").decode()
    while not text.endswith("="):
        text = base64.b64encode(base64.b64decode(text) + b"x").decode()
    assert "/" in text and "+" in text
    reader().of_url("data:image/png;base64," + text, "x")
    refused("data:image/png;base64," + change(text), code="invalid_base64")


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://x/y",
        "",
        "datA",
        " data:image/png;base64,AAAA",
        "javascript:alert(1)",
    ],
)
def test_other_urls_are_refused_and_not_repeated(url: str) -> None:
    error = refused(url, code="remote_images_off")
    assert "169" not in error.message and "passwd" not in error.message


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,",
        "data:image/png,AAAA",
        "data:text/plain;base64,AAAA",
        "data:;base64,AAAA",
        "data:image/png;base64;x=1,AAAA",
        "data:image/png;base64",
        "data:image/png;" + "x" * 300 + ";base64,AAAA",
    ],
)
def test_data_urls_must_be_of_pictures(url: str) -> None:
    refused(url, code="invalid_image_url")


def test_schemes_ignore_case() -> None:
    file = data_url(file_of(random_picture(6)))
    reader().of_url(file.replace("data:image/png;base64", "DATA:Image/PNG;BASE64"), "x")


def test_the_length_is_checked_to_the_byte_before_base64_is_decoded() -> None:
    file = file_of(random_picture(7))
    reader(image_bytes=len(file)).of_url(data_url(file), "x")
    refused(data_url(file), code="image_too_large", image_bytes=len(file) - 1)
    bad = "data:image/png;base64," + "!" * 10_000  # not even base64: it was not decoded
    refused(bad, code="image_too_large", image_bytes=5_000)


def test_pixels_are_checked_before_they_are_decoded() -> None:
    file = file_of(random_picture(8, 30, 40))
    reader(image_pixels=1200).of_url(data_url(file), "x")
    assert (
        "40 x 30"
        in refused(data_url(file), code="image_too_many_pixels", image_pixels=1199).message
    )


def bomb(width: int, height: int) -> bytes:
    """A PNG of zeros, about a thousandth of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 30_000])
def test_a_decompression_bomb_costs_neither_time_nor_memory(side: int) -> None:
    url = data_url(bomb(side, side))
    before, start = memory_bytes(), time.thread_time()
    refused(url, code="image_too_many_pixels")
    assert time.thread_time() - start < 0.05
    assert memory_bytes() - before < 5 * 2**20


def test_a_webp_that_declares_too_much_is_refused_by_its_header() -> None:
    """Side 16,383, the largest of the format, in a lossless file of one colour."""
    file = bytearray(file_of(np.zeros((8, 8, 3), np.uint8), "WEBP", lossless=True))
    place = file.index(b"VP8L") + 9  # 14 bits of each side less one follow the signature
    bits = 16_382 | 16_382 << 14
    file[place : place + 4] = struct.pack("<I", bits)
    before, start = memory_bytes(), time.thread_time()
    refused(data_url(bytes(file), "image/webp"), code="image_too_many_pixels")
    assert time.thread_time() - start < 0.05 and memory_bytes() - before < 5 * 2**20


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_damaged_files_are_refused_in_words_of_our_own(kind: str) -> None:
    random.seed(kind)
    file = file_of(random_picture(9, 40, 40), kind)
    for _ in range(150):
        damaged = bytearray(file)
        for _ in range(random.randint(1, 12)):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        cut = bytes(damaged[: random.randint(1, len(damaged))])
        url = data_url(cut)
        try:
            found = reader(image_pixels=2**20).of_url(url, "p")
            assert found.shape == (SIDE, SIDE, 3)
        except ApiError as error:
            assert error.status == 400 and error.code.startswith(("invalid_image", "image_too"))
            assert not PATH.search(error.message) and len(error.message) < 300


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused(kind: str) -> None:
    refused(data_url(file_of(random_picture(10), kind)), code="invalid_image")


def test_an_allowed_fetch_gets_the_address_and_its_file_is_checked_too() -> None:
    file, asked = file_of(random_picture(11, 70, 70)), []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return file

    found = PictureReader(SIDE, RequestLimits(), fetch).of_url("https://pictures.test/a", "x")
    assert np.array_equal(found, resize(random_picture(11, 70, 70), SIDE))
    assert asked == ["https://pictures.test/a"]
    with pytest.raises(ApiError, match="bytes"):
        PictureReader(SIDE, RequestLimits(image_bytes=100), fetch).of_url("https://p.test/a", "x")


def test_a_picture_that_cannot_be_fetched_names_its_field() -> None:
    def fetch(url: str) -> bytes:
        raise ApiError(400, "image_not_found", "the picture is not kept, or not any more")

    with pytest.raises(ApiError, match="not kept") as told:
        PictureReader(SIDE, RequestLimits(), fetch).of_url("/v1/mmi/images/x", "messages[3]")
    assert told.value.param == "messages[3]"


def test_all_pictures_together_have_a_limit_of_pixels() -> None:
    several = reader(all_pixels=2 * 40 * 40)
    urls = [data_url(file_of(random_picture(number, 40, 40))) for number in range(3)]
    for url in urls[:2]:
        several.of_url(url, "x")
        several.of_url(url, "x")  # a picture that comes again is decoded once
    with pytest.raises(ApiError) as caught:
        several.of_url(urls[2], "x")
    assert caught.value.code == "images_too_many_pixels"
