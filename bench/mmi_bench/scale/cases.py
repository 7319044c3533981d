"""Axes of the benchmark, and the points on them that a model allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmi_deploy.errors import ConfigError
from mmi_deploy.spec.config import ModelConfig
from mmi_deploy.spec.graphs import IMAGE_SLOT_PADDING, Limits

IMAGES, TOKENS, ROWS, STEPS = AXES = ("images", "tokens", "rows", "steps")

# Axis -> its label with the unit, and the step of the axis that growth is given for.
LABELS = {
    IMAGES: "images in context",
    TOKENS: "tokens in context",
    ROWS: "rows of a run",
    STEPS: "denoising steps",
}
UNITS = {IMAGES: (1, "image"), TOKENS: (100, "100 tokens"), ROWS: (1, "row"), STEPS: (1, "step")}

# Quantities: seconds of a stage, of a whole picture, and bytes.
ENCODE, PREFILL, DECODE, DENOISE, VAE, PICTURE, MEMORY = QUANTITIES = (
    "encode", "prefill", "decode", "denoise", "vae", "picture", "memory",
)  # fmt: skip

# Fewest points of an axis: a line through two always fits.
_FEWEST = 3

# Fewest tokens of a point.
_TOKENS = 16


@dataclass(frozen=True)
class Plan:
    """Points of each axis. decoded: tokens decoded at a point. drawn: denoising steps of a picture
    where their number does not vary. context: tokens of every document with images."""

    points: dict[str, tuple[int, ...]]
    decoded: int
    drawn: int
    context: int


def plan(config: ModelConfig, limits: Limits, steps: int, quick: bool = False) -> Plan:
    """Points that fit the model. steps: of the longest sampler. quick: few points an axis.

    Raises `ConfigError` for a context that is too short to measure any growth.
    """
    decoded = 3 if quick else 12
    # Begin of text, tokens to decode, and the begin-of-image token of the picture.
    usable = limits.context - decoded - 1
    of_image = config.visual_tokens + 1
    room = min((usable - 2) // of_image, limits.images)
    if room < _FEWEST - 1 or usable < _FEWEST * _TOKENS:
        raise ConfigError(
            "the bundle's context is too short to measure growth",
            expected=f"at least {max(2 * of_image + 2, _FEWEST * _TOKENS) + decoded + 1} tokens",
            got=limits.context,
            fix="export the bundle with a larger --context",
        )
    points = {
        IMAGES: (0, *_up_to(room, IMAGE_SLOT_PADDING)),
        TOKENS: _up_to(usable, _doubled(_TOKENS, usable)),
        ROWS: _up_to(limits.batch, _doubled(1, min(limits.batch, 8))),
        STEPS: _up_to(steps, _doubled(1, steps)),
    }
    if quick:
        points = {axis: _thinned(found) for axis, found in points.items()}
        points[IMAGES] = (0, *_thinned((1, *points[IMAGES][1:])))
    context = 1 + room * of_image + 1  # a token of text at least
    return Plan(points, decoded, min(steps, 2 if quick else 8), context)


def _doubled(first: int, last: int) -> tuple[int, ...]:
    found = [first]
    while found[-1] * 2 <= last:
        found.append(found[-1] * 2)
    return tuple(found)


def _up_to(most: int, wanted: Sequence[int]) -> tuple[int, ...]:
    """Those of `wanted` that are at most `most`, and `most` itself if it is well beyond them."""
    found = [count for count in wanted if count <= most]
    if not found or most > 1.2 * found[-1]:
        found.append(most)
    return tuple(found)


def _thinned(points: tuple[int, ...]) -> tuple[int, ...]:
    """First, middle and last."""
    return tuple(dict.fromkeys((points[0], points[len(points) // 2], points[-1])))
