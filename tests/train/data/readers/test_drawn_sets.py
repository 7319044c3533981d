"""Sets whose pictures are drawn: ADE20K, stories, captions to draw from; and VisDial."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_deploy.errors import DocumentError
from mmi_train.data.document import ImagePart
from mmi_train.data.readers.ade20k import label_colours
from mmi_train.data.readers.data_set import document_of
from mmi_train.data.readers.pictures import Clip
from train.data.readers.trees import checked, lines, npy, opened, png, put, shown


def label_map(*labels: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.array([labels], np.uint8)).save(file, "PNG")
    return file.getvalue()


def strip(*shades: int, side: int = 4) -> bytes:
    """Frames below one another."""
    file = io.BytesIO()
    frames = np.concatenate([np.full((side, side, 3), shade, np.uint8) for shade in shades])
    Image.fromarray(frames).save(file, "PNG")
    return file.getvalue()


def shades(sample: Any) -> list[int]:
    return [int(part.image[0, 0, 0]) for part in document_of(sample) if isinstance(part, ImagePart)]


def test_colours_of_labels() -> None:
    colours = label_colours()
    assert colours.shape == (151, 3) and colours[0].tolist() == [0, 0, 0]
    assert colours[1].tolist() == [255, 255, 255] and colours[8].tolist() == [255, 213, 213]
    assert colours[150].tolist() == [87, 255, 45]
    assert len(np.unique(colours, axis=0)) == 151


@pytest.mark.parametrize("inner", ["", "ADEChallengeData2016/"])
def test_ade20k_draws_pictures_from_coloured_maps(inner: str, tmp_path: Path) -> None:
    tree = put(
        tmp_path,
        {
            "validation.json": [
                {"image_id": "ADE_val_00000001", "caption": "a street"},
                {"image_id": "ADE_val_00000002", "caption": "lost"},
            ],
            f"{inner}annotations/validation/ADE_val_00000001.png": label_map(0, 1, 150),
            f"{inner}images/validation/ADE_val_00000001.jpg": 70,
        },
    )
    data = opened("ade20k", tree)
    (sample,) = data.samples()
    assert shown(sample) == [
        f"<{inner}annotations/validation/ADE_val_00000001.png>",
        "a street.",
        (f"{inner}images/validation/ADE_val_00000001.jpg",),
    ]
    plan, _, photo = document_of(sample)
    assert isinstance(plan, ImagePart) and not plan.draw
    assert plan.image[0].tolist() == [[0, 0, 0], [255, 255, 255], [87, 255, 45]]
    assert isinstance(photo, ImagePart) and photo.draw


def test_ade20k_without_captions_and_with_ready_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = put(
        tmp_path,
        {
            "images/training/ADE_train_00000001.jpg": 1,
            "images/training/ADE_train_00000002.jpg": 2,
            "images/training/ADE_train_00000003.jpg": 3,
            "annotations_with_color/training/ADE_train_00000001.png": 5,
            "annotations/training/ADE_train_00000002.png": label_map(151),
        },
    )
    found = checked("ade20k", tree, capsys)
    assert found["samples"] == 1 and len(found["documents"][0]["parts"]) == 2
    assert found["skipped"] == {"picture is broken": 1, "picture is missing": 1}


SCENES = [
    {"caption": "third.", "image_id": "s2", "sequence_index": 2},
    {"caption": " First! ", "image_id": "s0", "sequence_index": 0},
    {"caption": "second.", "image_id": "s1", "sequence_index": 1},
]


def test_vist_in_the_order_of_the_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = {
        "annotations": {"9": SCENES, "10": [{"caption": 3}], "11": [SCENES[0] | {"image_id": "x"}]}
    }
    files: dict[str, Any] = {f"images/val_images/s{n}.png": 50 + n for n in range(3)}
    tree = put(tmp_path, files | {"annotations/val_formatted_filtered.json": annotations})
    data = opened("vist", tree)
    (sample,) = data.samples()
    assert shown(sample) == [
        "First!",
        "<images/val_images/s0.png>",
        "second.",
        "<images/val_images/s1.png>",
        "third.",
        ("images/val_images/s2.png",),
    ]
    assert checked("vist", tree, capsys)["skipped"] == {
        "entry is malformed": 1,
        "picture is missing": 1,
    }


def test_vist_as_it_is_published(tmp_path: Path) -> None:
    scenes = [
        [
            {
                "story_id": "7",
                "text": text,
                "photo_flickr_id": photo,
                "worker_arranged_photo_order": at,
            }
        ]
        for at, text, photo in ((1, "b", "p1"), (0, "a", "p0"))
    ]
    files: dict[str, Any] = {f"train_images/p{n}.jpg": 1 for n in range(2)}
    tree = put(tmp_path, files | {"sis/train.story-in-sequence.json": {"annotations": scenes}})
    (sample,) = opened("vist", tree).samples()
    assert shown(sample) == [
        ["a"],
        ("train_images/p0.jpg",),
        ["b"],
        ("train_images/p1.jpg",),
    ]


def pororo(folder: Path) -> Path:
    frames = [f"Ep_1_0/{number}.png" for number in range(7)]
    files: dict[str, Any] = {
        frame: strip(*(10 * n + k for k in range(3))) for n, frame in enumerate(frames)
    }
    texts = {f"Ep_1_0/{n}": [f"\tcrong and LOOPY hold {n}.  ", "unused"] for n in range(7)}
    coded = [f"b'{frame}'" for frame in frames]
    ids = np.empty(3, object)
    ids[:] = [[2, 0], [1], [1, 0, 9]]
    return put(
        folder,
        files
        | {
            "descriptions.npy": npy(np.array(texts, object)),
            "img_cache4.npy": npy(np.array(coded[:3])),
            "following_cache4.npy": npy(np.array([coded[n + 1 : n + 5] for n in range(3)])),
            "train_seen_unseen_ids.npy": npy(ids),
        },
    )


def test_pororo(tmp_path: Path) -> None:
    tree = pororo(tmp_path)
    data = opened("pororo", tree)
    first, third = data.samples()
    assert (first.id, third.id) == ("0", "2")
    assert shown(first)[:2] == [["Crong and Loopy hold 0."], ("Ep_1_0/0.png",)]
    found = shades(first)
    assert [shade // 10 for shade in found] == [0, 1, 2, 3, 4]
    assert {shade % 10 for shade in found} <= {0, 1, 2} and shades(first) == found
    assert shades(data.sample(0)) == found, "the frames of an epoch stay the same"
    assert any(shades(data.sample(0, epoch)) != found for epoch in range(1, 9))
    test = opened("pororo", tree, split="test")
    drawn = [part.learn for part in next(test.samples()).pictures]
    assert drawn == [False, True, True, True, True]
    assert test.skipped == {"id is of no frame": 1}
    (tree / "descriptions.npy").unlink()
    with pytest.raises(DocumentError, match=r"lacks descriptions.npy"):
        opened("pororo", tree)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("form", ["png", "npy"])
def test_flintstones(cached: bool, form: str, tmp_path: Path) -> None:
    clips = [f"s_01_e_02_shot_{number:06d}_{number + 1:06d}" for number in range(0, 12, 2)]
    files: dict[str, Any] = {
        "flintstones_annotations_v1-0.json": [
            {"globalID": clip, "description": f"fred sees\n Mr. Slate {n}. "}
            for n, clip in enumerate(reversed(clips))
        ],
        "train-val-test_split.json": {"train": [clips[1], clips[3]], "val": [], "test": [clips[0]]},
    }
    for number, clip in enumerate(clips):
        frames = np.full((2, 4, 4, 3), number, np.uint8)
        if form == "npy":
            files[f"video_frames_sampled/{clip}.npy"] = npy(frames)
        else:
            files[f"video_frames_sampled_png/{clip}.png"] = strip(number, number)
    if cached:
        follow = {clip: clips[n + 1 : n + 5] for n, clip in enumerate(clips)}
        files["following_cache4.pkl"] = pickle.dumps(follow)
    data = opened("flintstones", put(tmp_path, files))
    (sample,) = data.samples()
    assert sample.id == clips[1] and shades(sample) == [1, 2, 3, 4, 5]
    assert shown(sample)[0] == ["Fred sees mr. Slate 4."]
    assert data.skipped == {"clip has fewer than 4 followers": 1}


def test_coco_to_draw_takes_the_first_caption_of_a_picture(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 44, "id": 1, "caption": "Drum"},
        {"image_id": 301, "id": 0, "caption": "Kite"},
        {"image_id": 44, "id": 2, "caption": "Horse"},
    ]
    files: dict[str, Any] = {f"val2014/COCO_val2014_{n:012d}.jpg": 1 for n in (44, 301)}
    data = opened(
        "coco-t2i", put(tmp_path, files | {"captions_val2014.json": {"annotations": annotations}})
    )
    assert [(one.id, one.answers) for one in data.samples()] == [(44, ("Drum",)), (301, ("Kite",))]
    assert shown(data.sample(0)) == ["drum", ("val2014/COCO_val2014_000000000044.jpg",)]


def test_ln_coco_is_drawn_from_again_by_the_seed(tmp_path: Path) -> None:
    content = lines(
        *({"dataset_id": "mscoco_val2017", "image_id": "8", "caption": f"8 {n}"} for n in range(9)),
        {"dataset_id": "mscoco_val2017", "image_id": "9", "annotator_id": 3, "caption": "9"},
        {"image_id": "x", "caption": "?"},
    )
    tree = put(
        tmp_path,
        {
            "coco_val_captions.jsonl": content,
            "val2017/000000000008.jpg": 1,
            "val2017/000000000009.jpg": 2,
        },
    )
    data = opened("ln-coco", tree)
    assert len(data) == 10 and data.skipped == {"entry is malformed": 1}
    many = [one.id for one in opened("ln-coco", tree, total=2010).samples()]
    assert len(many) == 2010 and 0.45 < np.mean(np.array(many[10:]) == 9) < 0.55
    assert many == [one.id for one in opened("ln-coco", tree, total=2010).samples()]


def visdial(folder: Path) -> Path:
    turns = [
        {"question": n, "answer": n, "answer_options": [2, n, 1], "gt_index": 1} for n in range(3)
    ]
    return put(
        folder,
        {
            "visdial_1.0_val.json": {
                "data": {
                    "questions": ["is it red", "how many", "where"],
                    "answers": ["yes", "two", "here"],
                    "dialogs": [
                        {"image_id": 33, "caption": "A bus", "dialog": turns},
                        {"image_id": 34, "caption": "A cat", "dialog": turns},
                        {"image_id": 35, "dialog": turns},
                    ],
                }
            },
            "visdial_1.0_val_dense_annotations.json": [
                {"image_id": 33, "round_id": 3, "gt_relevance": [0.5, 1, 0]},
                {"image_id": 35, "round_id": 1, "gt_relevance": [0.5, 1, 0]},
            ],
            "VisualDialog_val2018/VisualDialog_val2018_000000000033.jpg": 1,
        },
    )


def test_visdial_with_its_whole_history(tmp_path: Path) -> None:
    data = opened("visdial", visdial(tmp_path))
    (sample,) = data.samples()
    assert shown(sample)[1:] == [
        "caption: A bus. question: is it red? answer: yes. question: how many? answer: two. "
        "question: where? answer:",
        [" here"],
    ]
    assert sample.about == {
        "round_id": 3,
        "options": ["here", "here", "two"],
        "gt_index": 1,
        "gt_relevance": [0.5, 1.0, 0.0],
    }
    assert data.skipped == {"dialogue is not judged": 1, "entry is malformed": 1}


def test_visdial_with_the_published_history(tmp_path: Path) -> None:
    data = opened("visdial", visdial(tmp_path), published=frozenset({"published_history"}))
    assert shown(data.sample(0))[1] == (
        "caption: A bus. question: is it red? answer: yes. question: where? answer:"
    )


def test_a_strip_lower_than_a_frame_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = pororo(tmp_path)
    (tree / "Ep_1_0/3.png").write_bytes(png())
    found = checked("pororo", tree, capsys)
    assert found["samples"] == 0 and found["skipped"] == {"picture is broken": 2}


def test_a_clip_whose_header_lies_is_broken_and_costs_no_memory(tmp_path: Path) -> None:
    good = npy(np.zeros((2, 4, 4, 3), np.uint8))
    for content in (good.replace(b"(2, 4, 4, 3)", b"(2**40,4,4,3)"), good[:-1], b"x"):
        put(tmp_path, {"a.npy": content})
        with pytest.raises(DocumentError, match=r"a\.npy"):
            Clip(tmp_path / "a.npy", "a.npy").load()
    content = npy(np.zeros((2, 99, 4, 3), np.uint8)).replace(b"(2, 99,", b"(2, 98,")
    put(tmp_path, {"a.npy": content})
    with pytest.raises(DocumentError, match="not what its header says"):
        Clip(tmp_path / "a.npy", "a.npy").load()
    put(tmp_path, {"a.npy": npy(np.zeros((2, 4, 4), np.uint8))})
    with pytest.raises(DocumentError, match="is not a clip"):
        Clip(tmp_path / "a.npy", "a.npy").load()
