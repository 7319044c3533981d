"""A procedurally drawn world: scenes of coloured shapes on a grid, their pictures, and changes.

All training data of the tiny model comes from this world, so every caption, answer, box and picture
has an exact expected value. Pictures are uint8 [64, 64, 3] in RGB, rows first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import numpy as np

from mmi_train.data.corpus import Split

Choice = TypeVar("Choice")
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the end exclusive

IMAGE_SIDE = 64
HELD_OUT_PERCENT = 10

BACKGROUNDS: dict[str, Colour] = {
    "white": (240, 240, 240),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "pink": (250, 190, 205),
}
COLOURS: dict[str, Colour] = {
    "red": (225, 30, 30),
    "green": (20, 150, 40),
    "blue": (30, 60, 230),
    "yellow": (250, 215, 20),
    "purple": (160, 40, 190),
    "cyan": (50, 200, 225),
}
DARK_INK: Colour = (0, 0, 0)
LIGHT_INK: Colour = (255, 255, 255)

SHAPES = ("square", "ring", "cross", "triangle", "circle", "bar")
DIGIT = "digit"
# Colours of the segmentation picture: one per shape, on black, unrelated to the objects' colours.
SEGMENT_COLOURS: dict[str, Colour] = {
    "square": (255, 80, 80),
    "ring": (80, 255, 80),
    "cross": (80, 80, 255),
    "triangle": (255, 255, 80),
    "circle": (80, 255, 255),
    "bar": (255, 160, 0),
    DIGIT: (255, 80, 255),
}

DIGIT_WIDTH = 9
_DIGIT_ROWS = (
    "111101101101111 010110010010111 111001111100111 111001111001111 101101111001001 "
    "111100111001111 111100111101111 111001001001001 111101111101111 111101111001111"
).split()

DIRECTIONS: dict[str, tuple[int, int]] = {  # (rows down, columns right)
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
}
_ROW_NAMES = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMN_NAMES = {2: ("left", "right"), 3: ("left", "center", "right")}


@dataclass(frozen=True)
class WorldConfig:
    """Difficulty: the range of possible scenes. `widths` (odd, px) are the object sizes."""

    name: str
    max_objects: int
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    widths: tuple[int, ...]
    jitter: int  # px, the largest shift of an object from the centre of its cell
    digits: int = 0  # 0: no digits, 5: the digits 0-4
    digit_chance: float = 0.0  # the share of scenes that also hold a digit
    grid_side: int = 3

    @property
    def has_sizes(self) -> bool:
        """True if sizes differ, so that texts name them."""
        return len(self.widths) > 1

    @property
    def size_words(self) -> dict[int, str]:
        """Width in px -> "small" or "large"; empty if there is only one size."""
        return dict(zip(self.widths, ("small", "large"), strict=True)) if self.has_sizes else {}

    @property
    def segment_classes(self) -> tuple[str, ...]:
        """Shapes of the class numbers 1, 2, ... of a segmentation; 0 is the background."""
        return self.shapes + ((DIGIT,) if self.digits else ())


def easy() -> WorldConfig:
    """One or two large objects; the three shapes that differ most after a blur of 1.5 px."""
    return WorldConfig(
        name="easy",
        max_objects=2,
        shapes=SHAPES[:3],
        colours=("red", "green", "blue", "yellow", "purple"),
        backgrounds=("white", "black", "gray"),
        widths=(19,),
        jitter=1,
    )


def medium() -> WorldConfig:
    """One to three objects of two sizes and four shapes, and sometimes a digit 0-4."""
    return WorldConfig(
        name="medium",
        max_objects=3,
        shapes=SHAPES[:4],
        colours=tuple(COLOURS),
        backgrounds=tuple(BACKGROUNDS),
        widths=(11, 17),
        jitter=1,
        digits=5,
        digit_chance=0.2,
    )


def hard() -> WorldConfig:
    """One to four objects of two sizes and six shapes, and often a digit 0-9."""
    return replace(
        medium(), name="hard", max_objects=4, shapes=SHAPES, jitter=2, digits=10, digit_chance=0.4
    )


@dataclass(frozen=True, order=True)
class Object:
    """One object. A digit has `shape == "digit"` and no colour of its own (it is drawn in ink).

    Sorts in reading order: by row, then by column.
    """

    row: int
    column: int
    shape: str
    colour: str
    width: int  # px
    digit: int = -1
    shift_x: int = 0  # px from the centre of the cell
    shift_y: int = 0

    @property
    def cell(self) -> tuple[int, int]:
        """(row, column) in the grid."""
        return self.row, self.column

    @property
    def kind(self) -> tuple[str, str]:
        """(colour, shape): no two objects of a scene share it."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """A background and its objects, in reading order."""

    background: str
    objects: tuple[Object, ...]
    grid_side: int = 3

    @property
    def shapes(self) -> tuple[Object, ...]:
        """The objects that are not digits."""
        return tuple(item for item in self.objects if item.shape != DIGIT)

    @property
    def occupied(self) -> set[tuple[int, int]]:
        """The cells that hold an object."""
        return {item.cell for item in self.objects}


def ordered_scene(background: str, objects: list[Object], grid_side: int) -> Scene:
    """Build a scene, its objects sorted in reading order."""
    return Scene(background, tuple(sorted(objects)), grid_side)


def canonical(scene: Scene) -> Scene:
    """The scene without jitter, as far as a caption can describe it."""
    still = [replace(item, shift_x=0, shift_y=0) for item in scene.objects]
    return ordered_scene(scene.background, still, scene.grid_side)


def split_of(scene: Scene) -> Split:
    """The split of a scene, by a stable hash of its content; jitter does not count."""
    parts = [f"{scene.background}/{scene.grid_side}"]
    for item in sorted(scene.objects, key=lambda item: item.cell):
        parts.append(
            f"{item.row},{item.column},{item.shape},{item.colour},{item.width},{item.digit}"
        )
    digest = hashlib.blake2b(";".join(parts).encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT else "train"


# ---- pictures ---------------------------------------------------------------------------------


@cache
def coverage(shape: str, width: int, digit: int = -1) -> np.ndarray:
    """Coverage mask: the share of each pixel that the object covers, float32 [height, width]."""
    if shape == DIGIT:
        bits = np.array([int(bit) for bit in _DIGIT_ROWS[digit]], np.float32).reshape(5, 3)
        return np.kron(bits, np.ones((3, 3), np.float32))
    samples = 8  # per pixel and axis
    half = width / 2
    line = (np.arange(width * samples) + 0.5) / samples - half
    x, y = np.meshgrid(line, line)
    across, radius = np.maximum(abs(x), abs(y)), np.hypot(x, y)
    inside = {
        "square": across <= half - 1,
        "ring": (radius <= half) & (radius >= half - (4 if width > 13 else 3)),
        "cross": np.minimum(abs(x), abs(y)) <= (2.5 if width > 13 else 1.5),
        "triangle": abs(x) <= (y + half) / 2,
        "circle": radius <= half,
        "bar": abs(y) <= (3.5 if width > 13 else 2.5),
    }[shape]
    pixels = inside.reshape(width, samples, width, samples).astype(np.float32)
    return np.asarray(pixels.mean(axis=(1, 3)))


def cell_centre(index: int, grid_side: int) -> int:
    """The pixel row (or column) at the centre of a grid row (or column)."""
    return round((index + 0.5) * IMAGE_SIDE / grid_side)


def corner_of(item: Object, grid_side: int) -> tuple[int, int]:
    """(x, y) in px of the top left corner of the object's coverage mask."""
    height, width = coverage(item.shape, item.width, item.digit).shape
    x = cell_centre(item.column, grid_side) + item.shift_x - width // 2
    y = cell_centre(item.row, grid_side) + item.shift_y - height // 2
    return x, y


def box_of(item: Object, grid_side: int) -> Box:
    """Bounding box of the pixels that the object covers by half or more."""
    rows, columns = np.nonzero(coverage(item.shape, item.width, item.digit) >= 0.5)
    x, y = corner_of(item, grid_side)
    return (
        int(x + columns.min()),
        int(y + rows.min()),
        int(x + columns.max() + 1),
        int(y + rows.max() + 1),
    )


def ink_on(background: str) -> Colour:
    """Colour of a digit on `background`."""
    return LIGHT_INK if background == "black" else DARK_INK


def render(scene: Scene, segmentation: bool = False) -> np.ndarray:
    """Draw the scene, uint8 [64, 64, 3].

    With `segmentation` every object has the colour of its shape, without antialiasing, on black.
    """
    picture = np.empty((IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    picture[:] = (0, 0, 0) if segmentation else BACKGROUNDS[scene.background]
    for item in scene.objects:
        covered = coverage(item.shape, item.width, item.digit)[..., None]
        if segmentation:
            colour, covered = SEGMENT_COLOURS[item.shape], (covered >= 0.5).astype(np.float32)
        else:
            ink = item.shape == DIGIT
            colour = ink_on(scene.background) if ink else COLOURS[item.colour]
        x, y = corner_of(item, scene.grid_side)
        window = picture[y : y + covered.shape[0], x : x + covered.shape[1]]
        window[:] = window + covered * (np.array(colour, np.float32) - window) + 0.5
    return picture


# ---- words ------------------------------------------------------------------------------------


def reference_to(item: Object) -> str:
    """Unique name of an object in its scene: "red cross", "digit 3"."""
    return f"digit {item.digit}" if item.shape == DIGIT else f"{item.colour} {item.shape}"


def description_of(item: Object, config: WorldConfig) -> str:
    """Description of an object without its place: "a small red cross", "the digit 3"."""
    if item.shape == DIGIT:
        return f"the digit {item.digit}"
    size = config.size_words.get(item.width, "")
    return f"a {size} {item.colour} {item.shape}".replace("  ", " ")


def place_of(item: Object, grid_side: int) -> str:
    """The place in two words: "top left"."""
    return f"{_ROW_NAMES[grid_side][item.row]} {_COLUMN_NAMES[grid_side][item.column]}"


# ---- random scenes and changes ----------------------------------------------------------------


def _random_shift(rng: np.random.Generator, config: WorldConfig) -> dict[str, int]:
    shift_x, shift_y = rng.integers(-config.jitter, config.jitter + 1, size=2).tolist()
    return {"shift_x": shift_x, "shift_y": shift_y}


def _pick(rng: np.random.Generator, options: tuple[Choice, ...]) -> Choice:
    return options[int(rng.integers(len(options)))]


def _random_shape(
    rng: np.random.Generator,
    config: WorldConfig,
    cell: tuple[int, int],
    taken: set[tuple[str, str]],
) -> Object:
    """A random object that is not a digit, of a (colour, shape) that is not taken."""
    while True:
        colour, shape = _pick(rng, config.colours), _pick(rng, config.shapes)
        if (colour, shape) not in taken:
            width = _pick(rng, config.widths)
            return Object(*cell, shape, colour, width, **_random_shift(rng, config))


def _free_cells(
    rng: np.random.Generator, config: WorldConfig, occupied: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    order = rng.permutation(config.grid_side**2).tolist()
    cells = [divmod(index, config.grid_side) for index in order]
    return [cell for cell in cells if cell not in occupied]


def _any_scene(rng: np.random.Generator, config: WorldConfig) -> Scene:
    cells = _free_cells(rng, config, set())
    objects: list[Object] = []
    for _ in range(int(rng.integers(1, config.max_objects + 1))):
        taken = {item.kind for item in objects}
        objects.append(_random_shape(rng, config, cells.pop(), taken))
    if config.digits and rng.random() < config.digit_chance:
        digit, shift = int(rng.integers(config.digits)), _random_shift(rng, config)
        objects.append(Object(*cells.pop(), DIGIT, "", DIGIT_WIDTH, digit, **shift))
    return ordered_scene(_pick(rng, config.backgrounds), objects, config.grid_side)


def random_scene(
    rng: np.random.Generator, config: WorldConfig, split: Split | None = "train"
) -> Scene:
    """A random scene of `split`; None: of either split."""
    while True:
        scene = _any_scene(rng, config)
        if split is None or split_of(scene) == split:
            return scene


def _any_change(
    rng: np.random.Generator, scene: Scene, config: WorldConfig
) -> tuple[str, Scene] | None:
    """Draw one random change; None if it is impossible in this scene."""
    others = list(scene.objects)
    item = others.pop(int(rng.integers(len(others))))
    name, is_digit = reference_to(item), item.shape == DIGIT
    verb = _pick(rng, ("move", "move", "turn", "turn", "resize", "vanish", "appear"))
    if verb == "move":
        direction = _pick(rng, tuple(DIRECTIONS))
        row, column = (at + step for at, step in zip(item.cell, DIRECTIONS[direction], strict=True))
        inside = 0 <= row < scene.grid_side and 0 <= column < scene.grid_side
        if not inside or (row, column) in scene.occupied:
            return None
        sentence = f"the {name} moves {direction}."
        others.append(replace(item, row=row, column=column))
    elif verb == "turn":
        turned = replace(item, colour=_pick(rng, config.colours))
        if is_digit or turned.kind in {each.kind for each in scene.objects}:
            return None
        sentence = f"the {name} turns {turned.colour}."
        others.append(turned)
    elif verb == "resize":
        if is_digit or not config.has_sizes:
            return None
        small, large = config.widths
        grows = item.width == small
        sentence = f"the {name} {'grows' if grows else 'shrinks'}."
        others.append(replace(item, width=large if grows else small))
    elif verb == "vanish":
        if not is_digit and len(scene.shapes) < 2:
            return None
        sentence = f"the {name} vanishes."
    else:
        if len(scene.shapes) >= config.max_objects:
            return None
        cell = _free_cells(rng, config, scene.occupied)[0]
        new = _random_shape(rng, config, cell, {each.kind for each in scene.objects})
        sentence = f"{description_of(new, config)} appears at {place_of(new, scene.grid_side)}."
        others.extend([item, new])
    return sentence, ordered_scene(scene.background, others, scene.grid_side)


def change(
    rng: np.random.Generator,
    scene: Scene,
    config: WorldConfig,
    split: Split | None = "train",
    tries: int = 200,
) -> tuple[str, Scene] | None:
    """Change one thing: (sentence that describes the change, new scene of the same split).

    None if no change within the split was found: one held-out scene in six has none.
    """
    for _ in range(tries):
        found = _any_change(rng, scene, config)
        if found is not None and (split is None or split_of(found[1]) == split):
            return found
    return None
