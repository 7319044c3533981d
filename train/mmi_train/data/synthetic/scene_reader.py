"""Recognise the scene of a picture by template matching, and score pictures against scenes.

The reader matches the known shapes (templates) with the mask of all foreground pixels, best fit
first. It needs no training, is exact on clean pictures, and is robust to noise and light blur. It
grades drawn pictures, so foreground that fits no template counts as an object of shape "unknown":
a smudge is an error and is never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np

from mmi_train.data.synthetic.world import (
    BACKGROUNDS,
    COLOURS,
    DIGIT,
    DIGIT_WIDTH,
    IMAGE_SIDE,
    Object,
    Scene,
    WorldConfig,
    cell_centre,
    coverage,
    ink_on,
    ordered_scene,
    render,
)

UNKNOWN = "unknown"
INK = ""  # the colour name of a digit
_CANVAS = 96  # side of the padded square in which correlations are computed: no wrap-around
_LOWEST_FIT = 0.5  # intersection over union below which a template explains nothing
_SMUDGE = 25  # px; fewer remaining foreground pixels count as noise
_UNKNOWN_COLOUR = 80.0  # RGB distance from mixtures of known colours that makes a pixel foreground
_MOST_OBJECTS = 10


@dataclass(frozen=True)
class _Template:
    shape: str
    width: int
    digit: int
    mask: np.ndarray  # bool [height, width]


@dataclass(frozen=True)
class _Templates:
    """All templates of a world, with their Fourier transforms for correlation with a mask."""

    items: tuple[_Template, ...]
    areas: np.ndarray  # px [templates]
    shape_spectra: np.ndarray  # complex [templates, 96, 49]
    box_spectra: np.ndarray  # the same for each box size, 1 px wider than the mask on each side
    box_of: np.ndarray  # index of each template's box, int [templates]


@dataclass(frozen=True)
class Reading:
    """Recognised scene and class map of a picture."""

    scene: Scene
    class_map: np.ndarray  # int64 [64, 64], see `segmentation_of`


@dataclass(frozen=True)
class SceneScore:
    """Correct attributes of a picture, each over all of its objects."""

    count: bool
    background: bool
    shape: bool
    colour: bool
    place: bool
    size: bool
    digit: bool
    objects_found: float  # the share of the expected objects that are there in every attribute

    @property
    def whole(self) -> bool:
        """True if the picture shows the scene: every attribute is right."""
        return self.objects_found == 1.0 and self.count and self.background


def _spectrum(mask: np.ndarray) -> np.ndarray:
    """Conjugate Fourier transform of a mask centred on the origin of the canvas."""
    height, width = mask.shape
    canvas = np.zeros((_CANVAS, _CANVAS), np.float32)
    canvas[:height, :width] = mask
    centred = np.roll(canvas, (-(height // 2), -(width // 2)), axis=(0, 1))
    return np.conj(np.fft.rfft2(centred)).astype(np.complex64)


@cache
def _templates_of(config: WorldConfig) -> _Templates:
    kinds = [(shape, width, -1) for shape in config.shapes for width in config.widths]
    kinds += [(DIGIT, DIGIT_WIDTH, digit) for digit in range(config.digits)]
    items = tuple(_Template(*kind, coverage(*kind) >= 0.5) for kind in kinds)
    sizes = sorted({item.mask.shape for item in items})
    boxes = [np.ones((height + 2, width + 2), bool) for height, width in sizes]
    return _Templates(
        items=items,
        areas=np.array([item.mask.sum() for item in items], np.float32),
        shape_spectra=np.stack([_spectrum(item.mask) for item in items]),
        box_spectra=np.stack([_spectrum(box) for box in boxes]),
        box_of=np.array([sizes.index(item.mask.shape) for item in items]),
    )


def _fits(mask: np.ndarray, templates: _Templates) -> np.ndarray:
    """Intersection over union of every template at every centre, [templates, 64, 64]."""
    canvas = np.zeros((_CANVAS, _CANVAS), np.float32)
    canvas[:IMAGE_SIDE, :IMAGE_SIDE] = mask
    spectrum = np.fft.rfft2(canvas)
    size = (_CANVAS, _CANVAS)
    inside = np.s_[:, :IMAGE_SIDE, :IMAGE_SIDE]
    common = np.fft.irfft2(spectrum * templates.shape_spectra, s=size)[inside]
    around = np.fft.irfft2(spectrum * templates.box_spectra, s=size)[inside]
    union = templates.areas[:, None, None] + around[templates.box_of] - common
    return common / np.maximum(union, 1.0)


def _placed(mask: np.ndarray, y: int, x: int) -> np.ndarray:
    """A template's mask on the picture, centred at (y, x), bool [64, 64]."""
    height, width = mask.shape
    margin = 16
    picture = np.zeros((IMAGE_SIDE + 2 * margin, IMAGE_SIDE + 2 * margin), bool)
    top, left = y - height // 2 + margin, x - width // 2 + margin
    picture[top : top + height, left : left + width] = mask
    return picture[margin:-margin, margin:-margin]


def _mixed(
    difference: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit pixels as mixtures of the background and one colour, as blur and edges produce them.

    `difference` [..., 3]: pixels minus background. `directions` [colours, 3]: colours minus
    background. Returns the index of the colour with the smallest residual, its share in 0..1, and
    that residual (a distance in RGB), each [...].
    """
    shares = difference @ directions.T / (directions**2).sum(-1)  # [..., colours]
    shares = shares.clip(0.0, 1.0)
    rest = difference[..., None, :] - shares[..., None] * directions  # [..., colours, 3]
    squares = (rest**2).sum(-1)
    best = squares.argmin(-1)
    share = np.take_along_axis(shares, best[..., None], axis=-1)[..., 0]
    return best, share, np.sqrt(squares.min(-1))


def _nearest_cell(y: float, x: float, grid_side: int) -> tuple[int, int]:
    centres = np.array([cell_centre(index, grid_side) for index in range(grid_side)])
    return int(abs(centres - y).argmin()), int(abs(centres - x).argmin())


def read(image: np.ndarray, config: WorldConfig) -> Reading:
    """Recognise the scene of a picture [64, 64, 3] (uint8, or floats in 0..255)."""
    pixels = image.astype(np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    ground_colours = np.array([BACKGROUNDS[name] for name in config.backgrounds], np.float32)
    background = config.backgrounds[int(((ground_colours - ground) ** 2).sum(-1).argmin())]

    names = config.colours + ((INK,) if config.digits else ())
    palette = [COLOURS[name] for name in config.colours]
    palette += [ink_on(background)] if config.digits else []
    difference = pixels - ground
    directions = np.array(palette, np.float32) - ground
    _, share, rest = _mixed(difference, directions)
    foreground = (share > 0.5) | (rest > _UNKNOWN_COLOUR)  # [64, 64]

    def colour_of(region: np.ndarray) -> str:
        return names[int(_mixed(np.median(difference[region], axis=0), directions)[0])]

    templates = _templates_of(config)
    is_digit = np.array([item.shape == DIGIT for item in templates.items])
    class_map = np.zeros((IMAGE_SIDE, IMAGE_SIDE), np.int64)
    objects: list[Object] = []
    while foreground.sum() >= _SMUDGE and len(objects) < _MOST_OBJECTS:
        fits = _fits(foreground, templates)
        index, y, x = np.unravel_index(int(fits.argmax()), fits.shape)
        found = templates.items[index]
        # Ink marks a digit: if colour and shape disagree, take the best template of the other kind.
        for attempt in range(2):
            core = _placed(found.mask, int(y), int(x)) & foreground
            colour = colour_of(core)
            if attempt == 1 or (colour == INK) == (found.shape == DIGIT):
                break
            near = np.where(is_digit == (colour == INK), fits[:, y, x], -1.0)
            found = templates.items[int(near.argmax())]
        if fits[index, y, x] < _LOWEST_FIT:
            rows, columns = np.nonzero(foreground)
            cell = _nearest_cell(rows.mean(), columns.mean(), config.grid_side)
            colour = colour_of(foreground)
            objects.append(Object(*cell, UNKNOWN, colour, 0))
            break
        cell = _nearest_cell(int(y), int(x), config.grid_side)
        objects.append(Object(*cell, found.shape, colour, found.width, found.digit))
        height, width = found.mask.shape
        claimed = _placed(np.ones((height + 2, width + 2), bool), int(y), int(x)) & foreground
        class_map[claimed] = 1 + config.segment_classes.index(found.shape)
        foreground = foreground & ~claimed
    return Reading(ordered_scene(background, objects, config.grid_side), class_map)


def _attributes(item: Object) -> tuple[object, ...]:
    """Attributes in the order of `score`: shape, colour, place, size, digit."""
    return item.shape, item.colour, item.cell, item.width, item.digit


def _best_match(seen: tuple[Object, ...], expected: tuple[Object, ...]) -> np.ndarray:
    """Correct attributes of the expected objects, bool [expected, 5].

    Pairs seen and expected objects so that as many attributes as possible agree; an expected object
    without a partner has no correct attribute.
    """
    equal = np.zeros((max(len(seen), len(expected)), len(expected), 5), bool)
    for i, one in enumerate(seen):
        for j, other in enumerate(expected):
            pairs = zip(_attributes(one), _attributes(other), strict=True)
            equal[i, j] = [left == right for left, right in pairs]
    # A whole object outweighs any number of single attributes.
    worth = equal.sum(-1) + 100 * equal.all(-1)  # [seen, expected]
    columns = range(len(expected))
    best = max(
        permutations(range(len(equal)), len(expected)),
        key=lambda rows: sum(int(worth[i, j]) for i, j in zip(rows, columns, strict=True)),
    )
    return np.stack([equal[i, j] for i, j in zip(best, columns, strict=True)])


def score(image: np.ndarray, scene: Scene, config: WorldConfig) -> SceneScore:
    """Score a picture [64, 64, 3] against the scene that it should show.

    An attribute is right if it is right for every expected object; additional objects affect only
    the count.
    """
    seen = read(image, config).scene
    right = _best_match(seen.objects, scene.objects)
    shape, colour, place, size, digit = (bool(each) for each in np.all(right, axis=0))
    return SceneScore(
        count=len(seen.objects) == len(scene.objects),
        background=seen.background == scene.background,
        shape=shape,
        colour=colour,
        place=place,
        size=size,
        digit=digit,
        objects_found=float(np.all(right, axis=1).mean()),
    )


def segmentation_of(image: np.ndarray, config: WorldConfig) -> np.ndarray:
    """Class of every pixel of a picture, int64 [64, 64].

    0 is the background, n is `config.segment_classes[n - 1]`. Pixels that fit no template are
    background.
    """
    return read(image, config).class_map


def expected_segmentation(scene: Scene, config: WorldConfig) -> np.ndarray:
    """True class of every pixel of a scene's picture, int64 [64, 64]."""
    class_map = np.zeros((IMAGE_SIDE, IMAGE_SIDE), np.int64)
    for item in scene.objects:
        only = Scene(scene.background, (item,), scene.grid_side)
        covered = render(only, segmentation=True).any(axis=-1)
        class_map[covered] = 1 + config.segment_classes.index(item.shape)
    return class_map


def mean_iou(predicted: np.ndarray, expected: np.ndarray, classes: int) -> float:
    """Mean intersection over union of the classes 0..classes-1 that occur in either map."""
    values = []
    for index in range(classes):
        here, there = predicted == index, expected == index
        union = int((here | there).sum())
        if union:
            values.append(int((here & there).sum()) / union)
    return float(np.mean(values))
