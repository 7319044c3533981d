"""Mixtures of data sets in a folder: weights, caps, what is missing, and augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmi_deploy.errors import MmiError
from mmi_train.data.mixture import MixedDocuments, RowShape
from mmi_train.data.readers.ade20k import label_colours
from mmi_train.data.readers.data_set import Settings, picture_of
from mmi_train.data.readers.layouts import LAYOUTS
from mmi_train.data.readers.mixture import SetChoice, open_mixture
from mmi_train.data.readers.refer import box_text
from mmi_train.data.readers.registry import DATA_SETS, open_set
from mmi_train.data.synthetic.published_trees import NAMES, Sizes, write_tree
from mmi_train.data.synthetic.world import easy
from mmi_train.training.recipes import recipe, shipped

SIZES = Sizes(24, 2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name in NAMES:
        write_tree(folder / name, name, easy(), SIZES)
    return folder


def choices(**named: Any) -> dict[str, SetChoice]:
    return {name.replace("_", "-"): SetChoice(**values) for name, values in named.items()}


def test_a_mixture_has_the_weights_and_rows_of_its_recipe(root: Path) -> None:
    asked = choices(
        mmc4={"weight": 2, "rows": 4, "images": 15},
        laion_en={"weight": 1, "images": 30, "truncation": "document"},
        cc12m={"weight": 0},
        coco_caption={},
    )
    found = open_mixture(root, asked, rows=3)
    assert [source.name for source in found.sources] == ["mmc4", "laion-en", "coco-caption"]
    assert [source.weight for source in found.sources] == [2, 1, 24**0.5]
    assert [source.shape for source in found.sources] == [
        RowShape(4, 15, "image"),
        RowShape(3, 30, "document", only_after_image=True),  # as published for LAION alone
        RowShape(3, None, "image"),
    ]
    assert found.sha256 != open_mixture(root, asked, rows=2).sha256


def test_a_missing_set_is_named_with_its_layout_its_source_and_the_way_out(root: Path) -> None:
    asked = choices(mmc4={}, chartqa={}, docvqa={"folder": "documents"})
    with pytest.raises(MmiError) as caught:
        open_mixture(root, asked)
    line = str(caught.value)
    assert line.startswith(f"there is no folder {root}/chartqa of the data set chartqa; docvqa")
    assert "train/train_human.json" in line and "github.com/vis-nlp/ChartQA" in line
    assert "--set data.chartqa.weight=0 --set data.docvqa.weight=0" in line and "\n" not in line
    with pytest.raises(MmiError, match=r"lacks \*.txt .*--set data.cc12m.weight=0"):
        open_mixture(root, choices(cc12m={"folder": "vist"}))
    with pytest.raises(MmiError, match="flickr30k is published without a training split"):
        open_mixture(root, choices(flickr30k={"folder": "vist"}))
    with pytest.raises(MmiError, match="no data sets to look for.*--recipe"):
        open_mixture(root, choices(mmc4={"weight": 0}))


def test_training_never_falls_back_to_a_held_out_split(tmp_path: Path) -> None:
    """`open_set` takes the first split that is there, a recipe the training split alone."""
    write_tree(tmp_path / "vist", "vist", easy(), Sizes(5, 2))
    (tmp_path / "vist" / "train_formatted_filtered.json").unlink()
    assert open_set("vist", tmp_path / "vist").split == "val"
    with pytest.raises(MmiError, match="lacks train_formatted_filtered.json"):
        open_mixture(tmp_path, choices(vist={}))


def test_every_set_of_a_recipe_can_be_described_when_it_is_missing() -> None:
    named = {
        key.split(".")[1] for name in shipped() for key in recipe(name).values if "data." in key
    }
    assert len(named) > 20 and named <= {*LAYOUTS} <= {*DATA_SETS}


def test_the_trees_hold_what_the_readers_take_and_nothing_is_left_out(root: Path) -> None:
    for name in NAMES:
        data = open_set(name, root / name)
        assert len(data) and not data.skipped, name
        for sample in data.samples():
            for part in sample.pictures:
                assert picture_of(part).shape == (64, 64, 3)


def test_the_trees_are_the_same_whenever_they_are_written(root: Path, tmp_path: Path) -> None:
    for name in ("laion-coco", "ade20k"):
        write_tree(tmp_path / name, name, easy(), SIZES)
        for path in (tmp_path / name).rglob("*"):
            if path.is_file():
                assert path.read_bytes() == (root / path.relative_to(tmp_path)).read_bytes()


def mirrored(data: Any, index: int, epoch: int) -> bool:
    """True if the sample's picture is turned against its file."""
    plain = open_set(data.folder.name, data.folder.path, Settings(split=data.split))
    own = picture_of(data.sample(index, epoch).pictures[-1])
    other = picture_of(plain.sample(index, epoch).pictures[-1])
    turned = np.array_equal(own, other[:, ::-1])
    assert turned or np.array_equal(own, other)
    return turned and not np.array_equal(other, other[:, ::-1])


def test_a_mirrored_region_keeps_its_box_and_its_words(root: Path) -> None:
    """The pixels in the box stay the same but for the mirror; left and right change places."""
    data = open_set("refcoco", root / "refcoco", Settings(mirror=True))
    plain = open_set("refcoco", root / "refcoco")
    count = 0
    for index in range(len(data)):
        for epoch in range(3):
            own, other = data.sample(index, epoch), plain.sample(index, epoch)
            (x1, y1, x2, y2), (a1, b1, a2, b2) = (one.pictures[0].box for one in (own, other))
            inside = picture_of(own.pictures[0])[y1:y2, x1:x2]
            expected = picture_of(other.pictures[0])[b1:b2, a1:a2]
            assert own.answers == (box_text((x1, y1, x2, y2), 64, 64),)
            sentence, said = (
                next(p.text for p in one.parts if hasattr(p, "text")) for one in (own, other)
            )
            if np.array_equal(picture_of(own.pictures[0]), picture_of(other.pictures[0])):
                assert (sentence, own.answers) == (said, other.answers)
                continue
            count += 1
            np.testing.assert_array_equal(inside, expected[:, ::-1])
            swap = {"left": "right", "right": "left"}
            assert [swap.get(word, word) for word in said.replace("<", " <").split()] == (
                sentence.replace("<", " <").split()
            )
    assert 0.3 < count / (3 * len(data)) < 0.7


def test_a_mirrored_map_belongs_to_its_mirrored_picture(root: Path) -> None:
    """Both are mirrored or neither is, and the map keeps the colours of labels."""
    data = open_set("ade20k", root / "ade20k", Settings(mirror=True))
    plain = open_set("ade20k", root / "ade20k")
    turned = 0
    for index in range(len(data)):
        own, other = (one.sample(index, 1) for one in (data, plain))
        (plan, photo), (map_, picture) = (
            [picture_of(part) for part in one.pictures] for one in (own, other)
        )
        if np.array_equal(plan, map_):
            np.testing.assert_array_equal(photo, picture)
        else:
            turned += 1
            np.testing.assert_array_equal(plan, map_[:, ::-1])
            np.testing.assert_array_equal(photo, picture[:, ::-1])
        assert {tuple(colour) for colour in np.unique(plan.reshape(-1, 3), axis=0)} <= {
            tuple(colour) for colour in label_colours()
        }
    assert 0.2 < turned / len(data) < 0.8


def test_augmentation_is_keyed_by_sample_and_epoch_and_off_elsewhere(root: Path) -> None:
    data = open_set("refcoco", root / "refcoco", Settings(mirror=True))
    seen = [[mirrored(data, index, epoch) for index in range(len(data))] for epoch in (0, 1, 0)]
    assert seen[0] == seen[2] != seen[1]
    held_out = open_set("refcoco", root / "refcoco", Settings(split="val", mirror=True))
    assert not any(mirrored(held_out, index, 0) for index in range(len(held_out)))
    asked = recipe("grounding").values | recipe("segmentation").values
    augmented = {key.split(".")[1] for key in asked if key.endswith(".mirror")}
    assert augmented == {"refcoco", "refcoco+", "refcocog", "ade20k"}
    for name in ("pretrain", "vqa_captions", "stories"):
        assert not [key for key in recipe(name).values if key.endswith(".mirror")]
    assert SetChoice().mirror is False


def test_draws_change_with_the_seed(root: Path) -> None:
    def order(seed: int) -> list[str]:
        mixed = open_mixture(root, choices(cc12m={}), seed=seed)
        assert isinstance(mixed, MixedDocuments)
        return [type(mixed.parts(number)[0]).__name__ for number in range(len(mixed))]

    assert order(0) == order(0) != order(1)
