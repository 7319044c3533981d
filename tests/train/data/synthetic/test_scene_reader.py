"""The scene reader: exact on clean pictures, robust to noise and blur, and strict as a judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mmi_train.data.synthetic.scene_reader import (
    expected_segmentation,
    mean_iou,
    read,
    score,
    segmentation_of,
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
)

SETTINGS = [easy(), medium(), hard()]
by_setting = pytest.mark.parametrize("config", SETTINGS, ids=lambda config: config.name)


def share_read(
    config: WorldConfig, spoil: Callable[[np.ndarray], np.ndarray], number: int
) -> float:
    """The share of spoilt pictures that are read back as the scene that was drawn."""
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, config, split=None) for _ in range(number)]
    right = [read(spoil(render(scene)), config).scene == canonical(scene) for scene in scenes]
    return float(np.mean(right))


def blurred(picture: np.ndarray, passes: int) -> np.ndarray:
    """Applies the 3x3 binomial filter (standard deviation 0.71 px) some times."""
    out = picture.astype(np.float32)
    for _ in range(passes):
        for axis in (0, 1):
            padded = np.pad(out, [(1, 1) if each == axis else (0, 0) for each in range(3)], "edge")
            first, middle, last = (np.moveaxis(padded, axis, 0)[i : i + 64] for i in range(3))
            out = np.moveaxis((first + 2 * middle + last) / 4, 0, axis)
    return out


@by_setting
def test_clean_pictures_are_read_exactly(config: WorldConfig) -> None:
    assert share_read(config, lambda picture: picture, 300) == 1.0


@by_setting
def test_noise_of_standard_deviation_8_does_no_harm(config: WorldConfig) -> None:
    rng = np.random.default_rng(6)
    noise = lambda picture: picture + rng.normal(0, 8, picture.shape)  # noqa: E731
    assert share_read(config, noise, 100) >= 0.99


@by_setting
def test_light_blur_does_no_harm(config: WorldConfig) -> None:
    assert share_read(config, lambda picture: blurred(picture, 2), 100) >= 0.98


def test_easy_shapes_are_told_apart_under_strong_blur_and_noise_together() -> None:
    rng = np.random.default_rng(7)
    spoil = lambda picture: blurred(picture, 5) + rng.normal(0, 12, picture.shape)  # noqa: E731
    assert share_read(easy(), spoil, 100) >= 0.98


PAIR = Scene(
    "gray", (Object(0, 0, "cross", "red", 19, -1, 1, -1), Object(2, 1, "ring", "blue", 19))
)


def changed(index: int, **values: object) -> Scene:
    """The pair with one object changed."""
    objects = list(PAIR.objects)
    objects[index] = replace(objects[index], **values)  # type: ignore[arg-type]
    return replace(PAIR, objects=tuple(objects))


@pytest.mark.parametrize(
    ("drawn", "wrong", "found"),
    [
        (PAIR, set(), 1.0),
        (changed(0, shift_x=-1, shift_y=1), set(), 1.0),
        (changed(0, shape="square"), {"shape"}, 0.5),
        (changed(1, colour="green"), {"colour"}, 0.5),
        (changed(0, column=1), {"place"}, 0.5),
        (replace(PAIR, background="white"), {"background"}, 1.0),
        (replace(PAIR, objects=PAIR.objects[:1]), {"count", "shape", "colour", "place"}, 0.5),
    ],
    ids=["same", "jitter", "shape", "colour", "place", "background", "missing"],
)
def test_the_score_names_the_wrong_attribute(drawn: Scene, wrong: set[str], found: float) -> None:
    result = score(render(drawn), PAIR, easy())
    names = ("count", "background", "shape", "colour", "place")
    assert {name for name in names if not getattr(result, name)} == wrong
    assert result.objects_found == found
    assert result.whole == (not wrong)


@pytest.mark.parametrize("colour", [(250, 215, 20), (255, 255, 255), (0, 0, 0), (128, 255, 255)])
def test_a_smudge_of_any_colour_spoils_the_picture(colour: tuple[int, int, int]) -> None:
    picture = render(PAIR)
    picture[28:36, 44:52] = colour
    result = score(picture, PAIR, easy())
    assert not result.count and not result.whole
    assert result.objects_found == 1.0


def test_an_empty_picture_shows_nothing() -> None:
    picture = np.full((64, 64, 3), 128, np.uint8)
    result = score(picture, PAIR, easy())
    assert result.background and result.objects_found == 0.0 and not result.whole


@by_setting
def test_segmentation_of_a_clean_picture_is_the_drawn_one(config: WorldConfig) -> None:
    rng = np.random.default_rng(8)
    classes = 1 + len(config.segment_classes)
    for _ in range(30):
        scene = random_scene(rng, config)
        expected = expected_segmentation(scene, config)
        assert mean_iou(segmentation_of(render(scene), config), expected, classes) > 0.95


def test_mean_iou_counts_only_classes_that_occur() -> None:
    expected = np.array([[0, 0, 1, 1]])
    predicted = np.array([[0, 1, 1, 1]])
    assert mean_iou(predicted, expected, 5) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert mean_iou(expected, expected, 5) == 1.0
