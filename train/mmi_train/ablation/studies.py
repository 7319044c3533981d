"""Studies: tables of the paper and of training options, as rows of data.

A row is a change of the first row of its study, the baseline. Numbers of the paper stand beside
ours only for their direction: its models, data and measures are others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mmi_deploy.errors import ConfigError
from mmi_train.data.synthetic.world import WorldConfig, easy

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Measure:
    """A column: `name` in the tables, `metric` as `measures` computes it, in `unit`.
    `paper_better`: of the paper's measure in its place, as FID in that of an accuracy."""

    name: str
    metric: str
    better: Better = "higher"
    unit: str = "%"
    paper_better: Better = "higher"


@dataclass(frozen=True)
class Training:
    """All that decides the weights of a row but its seed and its scale.

    `fields`: changes of the configuration by dotted names. `parts`: names in `parts.PARTS`.
    `world`: of all documents. `mixture`: documents of a step. `learns`: patterns of the weights
    that learn. `fresh`: patterns of those that are new and not the start model's.
    """

    world: WorldConfig
    mixture: Mapping[str, int]
    learns: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    rate: float = 1e-3
    fields: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    text_weight: float = 1.0
    image_weight: float = 10.0


@dataclass(frozen=True)
class Row:
    """A row of a table. `paper`: its numbers there, by the names of measures."""

    name: str
    training: Training
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A table: `source` in the paper, the measures and the rows, the baseline first."""

    name: str
    title: str
    source: str
    measures: tuple[Measure, ...]
    rows: tuple[Row, ...]


CAPTION = Measure("captions", "caption")
DRAWING = Measure("pictures from text, whole scenes", "drawing: whole scene", paper_better="lower")
ANSWERS = Measure("questions", "question")
DIGITS = Measure("small digits", "digit")
SEGMENTATION = Measure("segmentation to image, mIoU", "segmentation: mIoU")
BOXES = Measure("boxes, IoU", "box: mean IoU")
STORIES = Measure("stories, mIoU", "story: mIoU")
TWO_SHOT = Measure("2-shot questions", "shots")
TEXT_LOSS = Measure("held-out text loss", "loss: text", "lower", "nats")
IMAGE_LOSS = Measure("held-out image loss", "loss: image", "lower", "")
COLOUR = Measure("colour error", "drawing: colour error", "lower", "of 255")
PLACE_COLOUR = Measure("place and colour", "drawing: place and colour")
BACKGROUND = Measure("background", "drawing: background")

# What learns in the paper's ablations: all but CLIP, the language model and the autoencoder.
_LEARNS = (
    r"look_back\.",
    r"^vision\.(?!encoder\.(embeddings|pre_norm|layers)\.)",
    r"^(boi_embedding|head\.head_new)",
    r"^image_decoder\.(?!vae\.)",
)

# One scale and one image, as in the paper's tables 5 to 8: the map of 8 x 8 cells, the image
# before.
_ONE_SCALE = {"llm_mmfs.levels": (1,), "image_decoder.mmfs.levels": (1,)}
_ONE_IMAGE = {
    "llm_mmfs.images": 2,
    "llm_mmfs.images_seen": 1,
    "image_decoder.mmfs.images": 2,
    "image_decoder.mmfs.images_seen": 1,
}
_SINGLE = {**_ONE_SCALE, **_ONE_IMAGE}

# Scenes of one or two large shapes, half of them with a digit of 9 by 15 pixels.
_DIGITS = replace(easy(), name="easy with digits", digits=5, digit_chance=0.5)

_BASE = Training(
    world=_DIGITS,
    mixture={"reading": 4, "digit": 6, "shots": 2, "drawing": 2, "segmentation": 3, "story": 1},
    learns=_LEARNS,
)


def _changed(fields: Mapping[str, Any] | None = None, **changes: Any) -> Training:
    return replace(_BASE, fields={**(fields or {})}, **changes)


def _paper(*values: float | None) -> dict[str, float]:
    names = (CAPTION.name, DRAWING.name, ANSWERS.name, DIGITS.name)
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


_TABLE = (CAPTION, DRAWING, ANSWERS, DIGITS)
_LOSSES = (TEXT_LOSS, IMAGE_LOSS)

_MMFS = Study(
    "mmfs",
    "MMFS on and off",
    "Tables 5a and 5c, Figures 5 to 8",
    (*_TABLE, SEGMENTATION, BOXES, STORIES, *_LOSSES),
    (
        Row(
            "without MMFS",
            _changed(parts=("no MMFS",)),
            {**_paper(107.0, 32.2, 28.7, 22.5), SEGMENTATION.name: 5.3},
        ),
        Row("with MMFS", _changed(), {**_paper(110.6, 30.0, 29.8, 27.7), SEGMENTATION.name: 35.9}),
    ),
)

_TOKENS = Study(
    "tokens",
    "few and many visual tokens",
    "Table 5a",
    (*_TABLE, *_LOSSES),
    (
        Row(
            "4 tokens, without MMFS",
            _changed({"vision_resampler.queries": 4}, parts=("no MMFS",)),
            _paper(107.0, 32.2, 28.7, 22.5),
        ),
        Row(
            "4 tokens, with MMFS",
            _changed({"vision_resampler.queries": 4}),
            _paper(110.6, 30.0, 29.8, 27.7),
        ),
        Row(
            "16 tokens, without MMFS",
            _changed(parts=("no MMFS",)),
            _paper(110.7, 32.7, 29.2, 23.6),
        ),
        Row("16 tokens, with MMFS", _changed(), _paper(110.9, 29.5, 29.6, 27.8)),
    ),
)

# The encoder's positions are new at another size: it learns too, at both.
_LOW = {"vision.image_size": 32}
_ENCODER = (*_LEARNS, r"^vision\.encoder\.")
_RESOLUTION = Study(
    "resolution",
    "low and high resolution",
    "Tables 5a and 5b",
    (*_TABLE, *_LOSSES),
    (
        Row(
            "32 pixels, without MMFS",
            _changed(_LOW, parts=("no MMFS",), learns=_ENCODER),
            _paper(107.0, 32.2, 28.7, 22.5),
        ),
        Row(
            "32 pixels, with MMFS", _changed(_LOW, learns=_ENCODER), _paper(110.6, 30.0, 29.8, 27.7)
        ),
        Row(
            "64 pixels, without MMFS",
            _changed(parts=("no MMFS",), learns=_ENCODER),
            _paper(110.5, 30.3, 29.9, 24.9),
        ),
        Row("64 pixels, with MMFS", _changed(learns=_ENCODER), _paper(115.2, 30.5, 30.6, 30.8)),
    ),
)

_ATTENTION = Study(
    "attention",
    "deformable and dense attention",
    "Table 6",
    (*_TABLE, *_LOSSES),
    (
        Row("deformable", _changed(_SINGLE), _paper(110.6, 30.0, 29.8, 27.7)),
        Row("dense", _changed(_SINGLE, parts=("dense",)), _paper(108.5, 30.6, 28.4, 23.6)),
        Row(
            "dense, resampled",
            _changed(_SINGLE, parts=("dense, resampled",)),
            _paper(107.2, 30.7, 28.9, 24.0),
        ),
    ),
)

_WEIGHTS = Study(
    "losses",
    "weight of the image loss",
    "Table 7",
    (*_TABLE, *_LOSSES),
    (
        Row("λ = 10", _changed(), _paper(110.6, 30.0, 29.8, 27.7)),
        Row("λ = 100", _changed(image_weight=100.0), _paper(106.2, 31.1, 29.8, 24.5)),
        Row("λ = 1", _changed(image_weight=1.0), _paper(110.0, 31.4, 29.3, 26.0)),
        Row("text alone", _changed(image_weight=0.0), _paper(105.7, None, 29.9, 27.6)),
        Row("images alone", _changed(text_weight=0.0), _paper(None, 34.2, None, None)),
    ),
)

_RESAMPLER = Study(
    "resampler",
    "MMFS and the resampler",
    "Table 8",
    (*_TABLE, *_LOSSES),
    (
        Row("both", _changed(), _paper(110.6, 30.0, 29.8, 27.7)),
        Row("resampler alone", _changed(parts=("no MMFS",)), _paper(107.0, 32.2, 28.7, 22.5)),
        Row("MMFS alone", _changed(parts=("no resampler",)), _paper(102.7, 32.0, 27.3, 22.0)),
    ),
)

_SHOTS = Study(
    "images",
    "scales and images of MMFS, 0- and 2-shot",
    "Tables 9 and 10",
    (*_TABLE, TWO_SHOT, SEGMENTATION, *_LOSSES),
    (
        Row(
            "one scale, one image",
            _changed(_SINGLE),
            {**_paper(110.6, 30.0, 29.8, 27.7), TWO_SHOT.name: 36.5},
        ),
        Row(
            "all scales, one image",
            _changed(_ONE_IMAGE),
            {**_paper(111.2, 29.5, 30.3, 28.1), TWO_SHOT.name: 38.5},
        ),
        Row(
            "all scales, all images",
            _changed(),
            {**_paper(111.2, 29.9, 31.1, 28.2), TWO_SHOT.name: 38.7},
        ),
    ),
)

# The diffusion part alone, on frozen conditions of a trained model: a new and narrower U-Net learns
# to draw one object from its caption, at half the size.
_DIFFUSION = Training(
    world=replace(easy(), name="easy, one object", max_objects=1),
    mixture={"drawing": 16},
    learns=(r"^image_decoder\.unet\.(?!look_back)",),
    fresh=(r"^image_decoder\.unet\.",),
    rate=3e-3,
    text_weight=0.0,
    image_weight=1.0,
)


def _option(**changes: Any) -> Training:
    fields = {
        "image_decoder.unet.latent_side": 8,
        "image_decoder.unet.block_widths": (32, 48, 48),
        "image_decoder.unet.attention_heads": (1, 1, 1),
        "image_decoder.diffusion.beta_end": 0.012,
        **{f"image_decoder.diffusion.{name}": value for name, value in changes.items()},
    }
    return replace(_DIFFUSION, fields=fields)


_V: dict[str, Any] = {"prediction": "v_prediction"}
_ZERO: dict[str, Any] = {**_V, "rescale_betas_zero_snr": True}
_OPTIONS = Study(
    "diffusion",
    "prediction, min-SNR weights and a terminal SNR of zero",
    "not in the paper; Hang et al. 2023, Lin et al. 2023",
    (DRAWING, PLACE_COLOUR, BACKGROUND, COLOUR),
    (
        Row("v", _option(**_V)),
        Row("ε, as published", _option(prediction="epsilon")),
        Row("v, min-SNR 5", _option(**_V, min_snr_gamma=5.0)),
        Row("v, zero terminal SNR", _option(**_ZERO)),
        Row("v, zero terminal SNR, min-SNR 5", _option(**_ZERO, min_snr_gamma=5.0)),
    ),
)

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        _MMFS, _TOKENS, _RESOLUTION, _ATTENTION, _WEIGHTS, _RESAMPLER, _SHOTS, _OPTIONS,
    )
}  # fmt: skip


def study_called(name: str) -> Study:
    """The study `name`; raises `ConfigError` that lists all."""
    if name not in STUDIES:
        raise ConfigError(f"there is no study {name!r}", expected=", ".join(STUDIES))
    return STUDIES[name]
