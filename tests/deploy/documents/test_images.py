"""Pictures: equal to the published pipeline, robust against what people link."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_deploy.documents import images
from mmi_deploy.errors import DocumentError


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("size", ["130x61", "33x90", "50x40"])
@pytest.mark.parametrize(
    ("fit", "published"), [("crop", "center_crop_32"), ("squash", "resize_32")]
)
def test_resize_equals_the_published_transform_bit_for_bit(
    golden: Callable[[str], Any], size: str, fit: images.Fit, published: str
) -> None:
    tensors = golden("preprocess").tensors
    ours = images.resize(tensors[f"{size}.in"], 32, fit)
    np.testing.assert_array_equal(ours, tensors[f"{size}.{published}"])


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (640, 480), (64, 64), (63, 129), (3000, 17)])
def test_resize_takes_any_size(size: tuple[int, int], fit: images.Fit) -> None:
    assert images.resize(noise(*size), 64, fit).shape == (64, 64, 3)


def test_a_picture_of_the_models_size_passes_unchanged() -> None:
    picture = noise(64, 64)
    np.testing.assert_array_equal(images.resize(picture, 64), picture)


def test_halving_keeps_the_mean_of_a_large_picture() -> None:
    """A box filter averages: a fine checkerboard becomes grey, not aliased."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    grey = images.resize(np.repeat(board[..., None], 3, 2).astype(np.uint8), 64)
    assert np.abs(grey.astype(int) - 127.5).max() <= 1


def test_pixels_and_rgb_are_inverse() -> None:
    picture = noise(5, 7)
    pixels = images.to_pixels(picture)
    assert pixels.shape == (3, 5, 7) and pixels.dtype == np.float32
    assert 0 <= pixels.min() and pixels.max() <= 1
    np.testing.assert_array_equal(images.to_rgb(pixels), picture)


def test_rgb_clips_rounds_and_refuses_what_is_not_finite() -> None:
    pixels = np.array([-1, 0.5 / 255 - 1e-4, 0.5 / 255 + 1e-4, 2], np.float32)
    rgb = images.to_rgb(np.broadcast_to(pixels, (3, 1, 4)))
    assert rgb[0, :, 0].tolist() == [0, 0, 1, 255]
    with pytest.raises(ValueError, match="not finite"):
        images.to_rgb(np.full((3, 1, 1), np.nan, np.float32))


def test_png_is_lossless(tmp_path: Path) -> None:
    picture = noise(9, 4)
    path = tmp_path / "a.png"
    path.write_bytes(images.to_png(picture))
    np.testing.assert_array_equal(images.read_rgb(path), picture)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    """A phone stores an upright photo lying on its side (orientation 6: turn right)."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = noise(4, 6)
    Image.fromarray(np.rot90(upright)).save(tmp_path / "phone.png", exif=exif)
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "phone.png"), upright)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    name = "a.tiff"
    Image.fromarray(noise(6, 8)).convert(mode).save(tmp_path / name)
    assert images.read_rgb(tmp_path / name).shape == (6, 8, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_greys_of_16_bits_are_brought_to_8(tmp_path: Path, name: str) -> None:
    grey = noise(6, 8)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name)
    np.testing.assert_array_equal(images.read_rgb(tmp_path / name), np.stack([grey] * 3, axis=2))


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    layered = np.zeros((2, 2, 4), np.uint8)
    layered[0, 0] = (10, 20, 30, 255)
    Image.fromarray(layered).save(tmp_path / "a.png")
    rgb = images.read_rgb(tmp_path / "a.png")
    assert rgb[0, 0].tolist() == [10, 20, 30]
    assert rgb[1, 1].tolist() == [255, 255, 255]


def truncated(tmp_path: Path, suffix: str) -> Path:
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "PNG" if suffix == "png" else "JPEG")
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_is_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DocumentError, match=rf"cut\.{suffix} is damaged") as caught:
        images.read_rgb(truncated(tmp_path, suffix))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DocumentError, match="not a picture that can be read"):
        images.read_rgb(tmp_path / "a.png")


def test_a_missing_picture_is_not_called_damaged(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "a.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(DocumentError, match=rf"cannot read the picture {path}: {reason}"):
            images.read_rgb(path)


def test_whatever_a_decoder_stumbles_over_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TypeError, which some damaged TIFF files lead to."""
    Image.fromarray(noise(6, 8)).save(tmp_path / "a.png")

    def stumble(image: Image.Image) -> None:
        raise TypeError("'float' object cannot be interpreted as an integer")

    monkeypatch.setattr(images.ImageOps, "exif_transpose", stumble)
    with pytest.raises(DocumentError, match=r"a\.png is damaged \('float' object"):
        images.read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    """100 and 200 million pixels of one colour are a file of some kilobytes."""
    path = tmp_path / "bomb.png"
    Image.new("1", (side, 10_000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(DocumentError) as caught:
        images.read_rgb(path)
    got = "10000 x 10000" if side == 10_000 else "more than 178 million"
    assert str(caught.value) == (
        f"the picture {path} is too large; expected at most 64 million pixels; got {got}. "
        "scale it down"
    )


@pytest.mark.parametrize("shape", [(1, 60000, 3), (60000, 3, 3), (5, 40, 3)])
def test_a_very_flat_picture_costs_no_memory_and_keeps_its_middle(
    shape: tuple[int, int, int],
) -> None:
    """Only the middle is kept, so nothing else is scaled up."""
    rgb = np.zeros(shape, np.uint8)
    middle = tuple(slice(max(n // 2 - 3, 0), n // 2 + 3) for n in shape[:2])
    rgb[middle] = 200
    tracemalloc.start()
    resized = images.resize(rgb, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert resized.shape == (64, 64, 3)
    assert resized[32, 32].min() > 100
    assert peak < 10_000_000


@pytest.mark.parametrize("size", [(37, 1000), (900, 37), (40, 7)])
def test_a_long_picture_is_scaled_as_a_whole(size: tuple[int, int]) -> None:
    """Cropping it before it is scaled would shift every pixel by a fraction."""
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    factor = 64 / min(size)
    height, width = (round(length * factor) for length in size)
    whole = Image.fromarray(rgb).resize((width, size[0]), Image.Resampling.BICUBIC)
    whole = whole.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - 64) // 2, (width - 64) // 2
    expected = np.asarray(whole)[top : top + 64, left : left + 64]
    assert np.array_equal(images.resize(rgb, 64), expected)
