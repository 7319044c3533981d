"""The documents: every answer is right, unambiguous and checkable."""

from __future__ import annotations

import re

import numpy as np
import pytest

from mmi_train.data.synthetic.scene_reader import read
from mmi_train.data.synthetic.tasks import (
    MAKERS,
    TaskImage,
    TaskText,
    box_from_text,
    box_iou,
    caption_of,
    grade,
    questions_about,
    reading_document,
    same_text,
    story_document,
)
from mmi_train.data.synthetic.world import (
    Object,
    Scene,
    WorldConfig,
    canonical,
    easy,
    hard,
    medium,
    random_scene,
    render,
    split_of,
)

SETTINGS = [easy(), medium(), hard()]
by_setting = pytest.mark.parametrize("config", SETTINGS, ids=lambda config: config.name)
SIZES = {11: "small ", 17: "large ", 19: ""}


def place(item: Object) -> str:
    """Computed anew, not with the world's own words."""
    return f"{'top middle bottom'.split()[item.row]} {'left center right'.split()[item.column]}"


def answers_to(question: str, objects: tuple[Object, ...], background: str) -> set[str]:
    """All answers that the picture allows, computed from what the reader sees in it."""
    shapes = [item for item in objects if item.digit < 0]
    if question == "how many shapes?":
        return {"zero one two three four".split()[len(shapes)]}
    if question == "what is the background?":
        return {background}
    if question == "which digit?":
        return {str(item.digit) for item in objects if item.digit >= 0}
    if found := re.fullmatch(r"what is at (.*)\?", question):
        here = [item for item in objects if place(item) == found[1]]
        return {
            f"the digit {item.digit}"
            if item.digit >= 0
            else f"a {SIZES[item.width]}{item.colour} {item.shape}"
            for item in here
        }
    if found := re.fullmatch(r"where is the digit (\d)\?", question):
        return {place(item) for item in objects if item.digit == int(found[1])}
    if found := re.fullmatch(r"(where is|what size is) the (\w+) (\w+)\?", question):
        named = [item for item in shapes if (item.colour, item.shape) == found.group(2, 3)]
        where = found[1] == "where is"
        return {place(item) if where else SIZES[item.width].strip() for item in named}
    if found := re.fullmatch(r"what colour is the (\w+)\?", question):
        return {item.colour for item in shapes if item.shape == found[1]}
    if found := re.fullmatch(r"what shape is (\w+)\?", question):
        return {item.shape for item in shapes if item.colour == found[1]}
    raise AssertionError(f"unknown question: {question}")


@by_setting
def test_every_question_has_exactly_one_answer_and_it_is_in_the_picture(
    config: WorldConfig,
) -> None:
    rng = np.random.default_rng(9)
    kinds = set()
    for _ in range(100):
        scene = random_scene(rng, config)
        seen = read(render(scene), config).scene
        questions = questions_about(scene, config)
        assert len({question for question, _ in questions}) == len(questions)
        for question, answer in questions:
            kinds.add(" ".join(question.split()[:2]))
            expected = answers_to(question, seen.objects, seen.background)
            assert {answer.removesuffix(".")} == expected, question
    assert {"how many", "what is", "where is", "what colour", "what shape"} <= kinds


@by_setting
def test_the_caption_tells_the_scene_apart_from_every_other(config: WorldConfig) -> None:
    rng = np.random.default_rng(10)
    scenes = {canonical(random_scene(rng, config)) for _ in range(1000)}
    assert len({caption_of(scene, config) for scene in scenes}) == len(scenes)


def test_captions_read_as_written_here() -> None:
    cross, ring = Object(0, 0, "cross", "red", 19), Object(1, 2, "ring", "blue", 19)
    square = Object(2, 1, "square", "red", 19)
    assert caption_of(Scene("white", (cross,)), easy()) == "a red cross at top left on white."
    assert (
        caption_of(Scene("gray", (cross, ring)), easy())
        == "a red cross at top left and a blue ring at middle right on gray."
    )
    assert (
        caption_of(Scene("gray", (cross, ring, square)), easy())
        == "a red cross at top left, a blue ring at middle right "
        "and a red square at bottom center on gray."
    )


@by_setting
def test_box_tokens_lose_less_than_half_of_the_box(config: WorldConfig) -> None:
    rng = np.random.default_rng(11)
    worst = 1.0
    for _ in range(200):
        document = reading_document(rng, config)
        for part in document.parts:
            if isinstance(part, TaskText) and part.box is not None:
                told = box_from_text(part.text)
                assert told is not None
                worst = min(worst, box_iou(told, part.box))
    assert worst > 0.5


def test_box_iou_against_hand_counted_boxes() -> None:
    assert box_iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert box_iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    assert box_iou((0, 0, 10, 10), (8, 8, 2, 2)) == 0.0
    assert box_from_text("<1> <2> <3>.") is None


@by_setting
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_target_grades_its_own_answer_as_right(
    config: WorldConfig, kind: str, split: str
) -> None:
    rng = np.random.default_rng(12)
    for _ in range(5):
        document = MAKERS[kind](rng, config, split)  # type: ignore[arg-type]
        assert document.kind == kind and document.targets
        for part in document.parts:
            if isinstance(part, TaskImage):
                assert part.image.shape == (64, 64, 3) and part.image.dtype == np.uint8
                assert split_of(part.scene) == split
        for target in document.targets:
            part = document.parts[target]
            if isinstance(part, TaskImage):
                assert part.draw
                assert grade(document, target, part.image).correct
                assert not grade(document, target, 255 - part.image).correct
            else:
                assert part.learn
                assert grade(document, target, part.text).correct
                assert not grade(document, target, "a red").correct


def test_answers_are_compared_without_regard_to_spacing_and_case() -> None:
    assert same_text("A red cross , top left .", "a red cross, top left.")
    assert not same_text("top left", "top left.")


def test_story_pictures_differ_from_one_to_the_next() -> None:
    rng = np.random.default_rng(13)
    for _ in range(50):
        pictures = [
            part for part in story_document(rng, easy()).parts if isinstance(part, TaskImage)
        ]
        assert 2 <= len(pictures) <= 4
        assert not pictures[0].draw and all(picture.draw for picture in pictures[1:])
        for before, after in zip(pictures, pictures[1:], strict=False):
            assert not np.array_equal(before.image, after.image)


def test_grading_refuses_the_wrong_kind_of_answer() -> None:
    document = MAKERS["drawing"](np.random.default_rng(14), easy(), "train")
    with pytest.raises(TypeError, match="is a picture"):
        grade(document, 1, "a red cross")
