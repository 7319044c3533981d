"""Golden cases of pictures: transforms, colour modes, mirroring, colours of labels.

Pictures of the cases follow a formula of their file's `format`; random choices of the published
code are compared as choices: the result is one of those possible.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from mmi_deploy.documents.images import Fit, Rgb, as_rgb, resize
from mmi_train.data.readers.ade20k import label_colours
from mmi_train.golden.differences import Case, differs


def drawn(about: Mapping[str, Any]) -> Rgb:
    """Picture of a case from its size and number; raises `ValueError` for another checksum."""
    x = np.arange(about["width"])[None, :, None]
    y = np.arange(about["height"])[:, None, None]
    c = np.arange(about["channels"])[None, None]
    checks = 40 * c * ((x // 8 + y // 8) % 2)
    pixels = (x * (3 + c) + y * (5 + 2 * c) + x * y // 7 + checks + 29 * about["k"]) % 256
    found = pixels.astype(np.uint8)
    if hashlib.sha256(found.tobytes()).hexdigest() != about["sha256"]:
        raise ValueError("the picture has another checksum than the case says")
    return found


# Shorter side to which the published transform `flip` scales, for a square of 224.
_FLIP_SIDE = 256 / 224


def transformed(rgb: Rgb, options: Mapping[str, Any]) -> list[Rgb]:
    """Pictures of a published transform, one for each of its resolutions.

    `numpy` and `dual_numpy` are our `crop`, `numpy_grounding` and those without a crop our
    `squash`. `flip`, torchvision's scaling with a centre crop, is used by no reader.
    """
    sides = [options["resolution"], *([options["resolution2"]] if "resolution2" in options else [])]
    kind = options["aug_type"]
    if kind == "flip":
        return [_scaled_and_cropped(rgb, side) for side in sides]
    squashes = kind in ("numpy_grounding", "resize") or not options.get("center_crop", True)
    fit: Fit = "squash" if squashes else "crop"
    return [resize(rgb, side, fit) for side in sides]


def _scaled_and_cropped(rgb: Rgb, side: int) -> Rgb:
    height, width = rgb.shape[:2]
    shorter = round(side * _FLIP_SIDE)
    size = [int(shorter * length / min(width, height)) for length in (width, height)]
    scaled = np.asarray(Image.fromarray(rgb).resize((size[0], size[1]), Image.Resampling.BICUBIC))
    top, left = (round((length - side) / 2) for length in scaled.shape[:2])
    return scaled[top : top + side, left : left + side]


def _planes(rgb: Rgb) -> list[Any]:
    return rgb.transpose(2, 0, 1).tolist()


def _transform(case: Case) -> str | None:
    found = transformed(drawn(case["input"]), case["options"])
    got = [hashlib.sha256(one.transpose(2, 0, 1).tobytes()).hexdigest() for one in found]
    return differs(got, [one["uint8_sha256"] for one in case["output"]], "uint8_sha256")


def _transform_small(case: Case) -> str | None:
    found = [_planes(one) for one in transformed(drawn(case["input"]), case["options"])]
    expected = case["output"]
    return differs(found, expected if len(found) == len(expected) != 3 else [expected], "pixels")


def _colour_mode(case: Case) -> str | None:
    """Colours of a file. The published code knows neither transparency nor 16 bits: where ours
    differ by intent, its own conversion is compared."""
    file = base64.b64decode(case["file_base64"])
    output = case["output"]
    with Image.open(io.BytesIO(file)) as image:
        published = np.asarray(image.convert("RGB"))
        ours = as_rgb(image)
    if "converted" not in output:  # the published code does not turn pictures upright
        checksum = hashlib.sha256(published.tobytes()).hexdigest()
        size = [published.shape[1], published.shape[0]]
        return differs([size, checksum], [output["size"], output["pixels_sha256"]], "picture")
    if case["mode"] not in ("LA", "I;16") and not np.array_equal(ours, published):
        return "our colours differ from the published ones"
    small = resize(published, case["options"]["resolution"])
    return differs(published.tolist(), output["converted"], "converted") or differs(
        _planes(small), output["after_convert"], "after_convert"
    )


def _flip(case: Case) -> str | None:
    output = case["output"]
    if case.get("name") == "random crop":
        rgb = drawn(case["input"])
        crops = [_planes(crop) for crop in _crops(rgb, case["options"]["resolution"])]
        return None if output in crops else "is no crop of the scaled picture"
    if case.get("name") == "ade20k training pair":
        plan, photo = drawn(case["coloured_map"]), drawn(case["picture"])
        side, larger = case["options"]["resolution"], case["options"]["resolution2"]
        turn = slice(None, None, -1 if output["turned_upside_down"] else 1)
        ours = {
            "encoder_map": _planes(resize(plan, side)[turn]),
            "encoder_picture": _planes(resize(photo, side)[turn]),
            "decoder_of_map": _planes(resize(photo, larger)),  # published fault: not the map
            "decoder_of_picture": _planes(resize(photo, larger)),  # published fault: never turned
        }
        return differs(ours, {key: output[key] for key in ours}, "output")
    # Draws of single pictures, and of the two of a dual transform, which the published code
    # mirrors apart: both ways occur.
    pairs = output["dual_numpy_flipped_left_right_encoder_decoder"]
    apart = any(one != other for one, other in pairs)
    single = set(output["numpy_flipped_left_right"])
    return None if apart and single == {True, False} else "does not mirror at random"


def _crops(rgb: Rgb, side: int) -> Iterator[Rgb]:
    """Crops of the published random crop, whose shorter side is up to 1 / 0.8 of the square."""
    for longer in range(side, int(side / 0.8) + 2):
        image = Image.fromarray(rgb)
        while min(image.size) >= 2 * longer:
            half = image.width // 2, image.height // 2
            image = image.resize(half, Image.Resampling.BOX)
        factor = longer / min(image.size)
        size = round(image.width * factor), round(image.height * factor)
        scaled = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        for top in range(scaled.shape[0] - side + 1):
            for left in range(scaled.shape[1] - side + 1):
                yield scaled[top : top + side, left : left + side]


def _ade20k_colour(case: Case) -> str | None:
    """Colours of labels; both refuse a label beyond 150."""
    colours = label_colours()
    labels = np.arange(len(colours)) if isinstance(case["input"], str) else np.array(case["input"])
    if labels.max() >= len(colours):
        return differs({"error": "IndexError"}, case["output"], "colours")
    return differs(colours[labels].tolist(), case["output"], "colours")


CHECKS: Mapping[str, Callable[[Case], str | None]] = {
    "transform": _transform,
    "transform_small": _transform_small,
    "colour_mode": _colour_mode,
    "flip": _flip,
    "ade20k_colour": _ade20k_colour,
}
