"""Training documents of the tiny model: the paper's fine-tuning tasks in small, with answers.

A document is a list of text and image parts. Kinds: `reading` (one image, then caption, question
and referring turns, as in a chat), its single turns `caption`, `question` and `referring`, `digit`
(which digit a picture shows), `shots` (several images with a question and its answer each),
`drawing` (caption to picture), `segmentation` (class map and words to picture) and `story`
(pictures that change as the sentences say). Every answer ends in a full stop, which ends decoding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mmi_train.data.document import ImagePart, TextPart
from mmi_train.data.synthetic.scene_reader import SceneScore, score
from mmi_train.data.synthetic.world import (
    DIGIT,
    Box,
    Object,
    Scene,
    Split,
    WorldConfig,
    box_of,
    change,
    description_of,
    place_of,
    random_scene,
    reference_to,
    render,
)

NUMBER_WORDS = ("zero", "one", "two", "three", "four")
BOX_PIXELS = 2  # a box token counts in steps of this many pixels: <0>..<32>


@dataclass(frozen=True)
class TaskText(TextPart):
    """A text of a task document. `role` is the kind of turn that it belongs to."""

    role: str
    box: Box | None = None  # px; the true box if the text is a referring answer


@dataclass(frozen=True)
class TaskImage(ImagePart):
    """A picture of the world, uint8 [64, 64, 3], and the scene that it shows."""

    scene: Scene


TaskPart = TaskText | TaskImage


@dataclass(frozen=True)
class TaskDocument:
    """One document of the world. `targets`: indices of the parts that `grade` can check."""

    kind: str
    parts: tuple[TaskPart, ...]
    targets: tuple[int, ...]
    config: WorldConfig


@dataclass(frozen=True)
class Grade:
    """Score of a generated part: `value` in 0..1 (the IoU of a box), and right or wrong."""

    correct: bool
    value: float
    scene: SceneScore | None = None  # for drawn pictures


# ---- texts ------------------------------------------------------------------------------------


def _listed(phrases: list[str]) -> str:
    """Join phrases as "x", "x and y" or "x, y and z"."""
    return " and ".join([*filter(None, [", ".join(phrases[:-1])]), phrases[-1]])


def caption_of(scene: Scene, config: WorldConfig) -> str:
    """The one caption: "a red cross at top left and a blue ring at top right on gray."."""
    phrases = [
        f"{description_of(item, config)} at {place_of(item, config.grid_side)}"
        for item in scene.objects
    ]
    return f"{_listed(phrases)} on {scene.background}."


def colouring_of(scene: Scene, config: WorldConfig) -> str:
    """The caption without places, to go with a class map: "a red cross on gray."."""
    phrases = [description_of(item, config) for item in scene.objects]
    return f"{_listed(phrases)} on {scene.background}."


def box_text(box: Box) -> str:
    """The box as four tokens in steps of two pixels: "<1> <3> <10> <12>."."""
    return " ".join(f"<{(edge + 1) // BOX_PIXELS}>" for edge in box) + "."


def box_from_text(text: str) -> Box | None:
    """Parse the pixel box of a text; None unless it has exactly four box tokens."""
    edges = [BOX_PIXELS * int(number) for number in re.findall(r"<(\d+)>", text)]
    return (edges[0], edges[1], edges[2], edges[3]) if len(edges) == 4 else None


def box_iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes; 0 for an empty or inverted one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (areas - width * height)


def questions_about(scene: Scene, config: WorldConfig) -> list[tuple[str, str]]:
    """All questions that have exactly one answer, as (question, answer)."""
    shapes = [item.shape for item in scene.shapes]
    colours = [item.colour for item in scene.shapes]
    found = [
        ("how many shapes?", f"{NUMBER_WORDS[len(shapes)]}."),
        ("what is the background?", f"{scene.background}."),
    ]
    for item in scene.objects:
        name, place = reference_to(item), place_of(item, config.grid_side)
        found.append((f"where is the {name}?", f"{place}."))
        found.append((f"what is at {place}?", f"{description_of(item, config)}."))
        if item.shape == DIGIT:
            found.append(("which digit?", f"{item.digit}."))
            continue
        if shapes.count(item.shape) == 1:
            found.append((f"what colour is the {item.shape}?", f"{item.colour}."))
        if colours.count(item.colour) == 1:
            found.append((f"what shape is {item.colour}?", f"{item.shape}."))
        if config.has_sizes:
            found.append((f"what size is the {name}?", f"{config.size_words[item.width]}."))
    return found


# ---- documents --------------------------------------------------------------------------------


def _turn(role: str, prompt: str, answer: str, box: Box | None = None) -> list[TaskPart]:
    return [TaskText(prompt, False, role), TaskText(answer, True, role, box)]


def _caption_turn(scene: Scene, config: WorldConfig) -> list[TaskPart]:
    return _turn("caption", "caption:", caption_of(scene, config))


def _referring_turn(item: Object, config: WorldConfig) -> list[TaskPart]:
    box = box_of(item, config.grid_side)
    return _turn("referring", f"find the {reference_to(item)}.", box_text(box), box)


def _about_image(
    kind: str, scene: Scene, config: WorldConfig, turns: list[TaskPart]
) -> TaskDocument:
    """A document of one given picture and turns of prompt and answer."""
    parts = (TaskImage(render(scene), False, scene), *turns)
    return TaskDocument(kind, parts, tuple(range(2, len(parts), 2)), config)


def caption_document(
    rng: np.random.Generator, config: WorldConfig, split: Split = "train"
) -> TaskDocument:
    """A picture and its caption."""
    scene = random_scene(rng, config, split)
    return _about_image("caption", scene, config, _caption_turn(scene, config))


def question_document(
    rng: np.random.Generator, config: WorldConfig, split: Split = "train"
) -> TaskDocument:
    """A picture, a question about it and the answer."""
    scene = random_scene(rng, config, split)
    options = questions_about(scene, config)
    question, answer = options[int(rng.integers(len(options)))]
    return _about_image("question", scene, config, _turn("question", question, answer))


def digit_document(
    rng: np.random.Generator, config: WorldConfig, split: Split = "train"
) -> TaskDocument:
    """A picture with a digit, and which one it is; in a world without digits, any question."""
    if not config.digits:
        return replace(question_document(rng, config, split), kind="digit")
    scene = random_scene(rng, replace(config, digit_chance=1.0), split)
    digit = next(item for item in scene.objects if item.shape == DIGIT)
    turn = _turn("question", "which digit?", f"{digit.digit}.")
    return _about_image("digit", scene, config, turn)


def shots_document(
    rng: np.random.Generator, config: WorldConfig, split: Split = "train", shots: int = 2
) -> TaskDocument:
    """`shots` pictures with a question and its answer each, then one more, which is the target."""
    asked = [question_document(rng, config, split) for _ in range(shots + 1)]
    parts = tuple(part for document in asked for part in document.parts)
    return TaskDocument("shots", parts, (len(parts) - 1,), config)


def referring_document(
    rng: np.random.Generator, config: WorldConfig, split: Split = "train"
) -> TaskDocument:
    """A picture, an object to find and its box."""
    scene = random_scene(rng, config, split)
    item = scene.objects[int(rng.integers(len(scene.objects)))]
    return _about_image("referring", scene, config, _referring_turn(item, config))


def reading_document(
    rng: np.random.Generator,
    config: WorldConfig,
    split: Split = "train",
    questions: int = 4,
    boxes: int = 2,
) -> TaskDocument:
    """One picture with several different questions and boxes in random order, and its caption: in
    three documents of four at the end, where it answers none of them."""
    scene = random_scene(rng, config, split)
    options = questions_about(scene, config)
    chosen = rng.permutation(len(options))[:questions].tolist()
    turns = [_turn("question", *options[index]) for index in chosen]
    chosen = rng.permutation(len(scene.objects))[:boxes].tolist()
    turns += [_referring_turn(scene.objects[index], config) for index in chosen]
    order = rng.permutation(len(turns)).tolist()
    turns = [turns[index] for index in order]
    at = len(turns) if rng.random() < 0.75 else int(rng.integers(len(turns) + 1))
    turns.insert(at, _caption_turn(scene, config))
    return _about_image("reading", scene, config, [part for turn in turns for part in turn])


def drawing_document(
    rng: np.random.Generator, config: WorldConfig, split: Split = "train"
) -> TaskDocument:
    """A caption and the picture to be drawn from it."""
    scene = random_scene(rng, config, split)
    text = TaskText(f"draw: {caption_of(scene, config)}", False, "drawing")
    return TaskDocument("drawing", (text, TaskImage(render(scene), True, scene)), (1,), config)


def segmentation_document(
    rng: np.random.Generator, config: WorldConfig, split: Split = "train"
) -> TaskDocument:
    """A class map of the shapes, the true colours in words, and the picture to draw."""
    scene = random_scene(rng, config, split)
    parts = (
        TaskImage(render(scene, segmentation=True), False, scene),
        TaskText(f"paint: {colouring_of(scene, config)}", False, "segmentation"),
        TaskImage(render(scene), True, scene),
    )
    return TaskDocument("segmentation", parts, (2,), config)


def story_document(
    rng: np.random.Generator, config: WorldConfig, split: Split = "train", pictures: int = 0
) -> TaskDocument:
    """A picture, then sentences that change it, each followed by the changed picture to draw.

    `pictures` counts the first one too; 0 draws the number from 2..4.
    """
    pictures = pictures or int(rng.integers(2, 5))
    scene = random_scene(rng, config, split)
    parts: list[TaskPart] = [TaskImage(render(scene), False, scene)]
    for _ in range(pictures - 1):
        changed = change(rng, scene, config, split)
        if changed is None:  # no change stays within the split: start another story
            return story_document(rng, config, split, pictures)
        sentence, scene = changed
        parts.append(TaskText(sentence, True, "story"))
        parts.append(TaskImage(render(scene), True, scene))
    return TaskDocument("story", tuple(parts), tuple(range(2, len(parts), 2)), config)


DocumentMaker = Callable[[np.random.Generator, WorldConfig, Split], TaskDocument]
MAKERS: dict[str, DocumentMaker] = {
    "reading": reading_document,
    "caption": caption_document,
    "question": question_document,
    "referring": referring_document,
    "digit": digit_document,
    "shots": shots_document,
    "drawing": drawing_document,
    "segmentation": segmentation_document,
    "story": story_document,
}


# ---- checkers ---------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Normalise a text for comparison: lower case, tokens separated by single spaces."""
    words = re.findall(r"<\d+>|\w+|[^\w\s]", text.lower())
    return " ".join(words)


def same_text(produced: str, expected: str) -> bool:
    """Exact match of two texts but for case and spacing."""
    return plain(produced) == plain(expected)


def grade(document: TaskDocument, target: int, produced: str | np.ndarray) -> Grade:
    """Grade a model's output for the part with index `target`.

    A text must match exactly; a box is right if its IoU with the true box exceeds 0.5; a picture
    ([64, 64, 3], 0..255) is right if it shows the whole scene. Raises `TypeError` for an output of
    the wrong kind.
    """
    part = document.parts[target]
    if isinstance(part, TaskImage):
        if isinstance(produced, str):
            raise TypeError(f"part {target} is a picture; got the text {produced!r}")
        result = score(produced, part.scene, document.config)
        return Grade(result.whole, result.objects_found, result)
    if not isinstance(produced, str):
        raise TypeError(f"part {target} is a text; got an array of shape {produced.shape}")
    if part.box is not None:
        box = box_from_text(produced)
        iou = 0.0 if box is None else box_iou(box, part.box)
        return Grade(iou > 0.5, iou)
    correct = same_text(produced, part.text)
    return Grade(correct, float(correct))
