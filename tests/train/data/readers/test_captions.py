"""Captions: COCO in both forms, Flickr30k, NoCaps, Image2Paragraph, TextCaps."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from mmi_deploy.cli.app import run
from mmi_deploy.errors import DocumentError, MmiError
from train.data.readers.trees import checked, opened, png, put, shown

SFT = "Provide a one-sentence caption for the provided image."
FIRST = "val2014/COCO_val2014_000000000100.jpg"


def karpathy(folder: Path) -> Path:
    entries: list[Any] = [
        {"image": FIRST, "caption": "A Red ring. ", "image_id": "coco_100"},
        {"image": "val2014/COCO_val2014_000000000101.jpg", "caption": "Gone"},
        {"image": FIRST, "caption": ["Two", "Three"]},
        {"image": "val2014/COCO_val2014_000000000102.jpg", "caption": "Broken"},
        {"image": FIRST, "caption": " "},
        {"image": "../secret.jpg", "caption": "Outside"},
        {"caption": "No picture"},
    ]
    return put(
        folder,
        {
            "annotations/coco_karpathy_train.json": entries,
            "annotations/coco_karpathy_test.json": [
                {"image": FIRST, "caption": ["One", "Two"]},
                {"image": FIRST, "caption": "Three"},
            ],
            FIRST: 90,
            "val2014/COCO_val2014_000000000102.jpg": png()[:40],
        },
    )


def test_coco_captions_are_counted_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = checked("coco-caption", karpathy(tmp_path), capsys, "--show", "1")
    assert found == {
        "name": "coco-caption",
        "samples": 2,
        "skipped": {
            "picture is missing": 1,
            "picture is broken": 1,
            "caption is empty": 1,
            "picture lies outside": 1,
            "entry is malformed": 1,
        },
        "documents": [
            {
                "parts": [
                    {"image": FIRST},
                    {"text": SFT, "learn": False},
                    {"text": " a red ring.", "learn": True},
                ],
                "answers": ["A Red ring. "],
            }
        ],
    }


def test_the_readable_summary_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    tree = karpathy(tmp_path / "coco")
    before = sorted(tree.rglob("*"))
    assert run(["data", "check", "coco-caption", str(tree), "--sheet", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert "coco-caption, split train: 2 samples, 5 left out" in printed
    assert "read from annotations/coco_karpathy_train.json" in printed
    assert "picture is missing" in printed and "« a red ring.»" in printed
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert sorted(tree.rglob("*")) == before, "nothing is written into the folder"


def test_quick_looks_for_pictures_without_decoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = ("--sheet", str(tmp_path / "sheet.png"))  # the broken picture's place stays empty
    found = checked("coco-caption", karpathy(tmp_path), capsys, "--quick", *sheet)
    assert found["samples"] == 3 and "picture is broken" not in found["skipped"]


def test_evaluation_asks_once_for_each_picture(tmp_path: Path) -> None:
    data = opened("coco-caption", karpathy(tmp_path), split="test")
    (sample,) = data.samples()
    assert (sample.id, sample.answers) == (100, ("One", "Two", "Three"))
    assert [getattr(part, "text", "") for part in sample.prompt] == ["", "a photo of"]


def test_official_files_name_their_pictures_or_number_them(tmp_path: Path) -> None:
    annotations = [
        {"image_id": 7, "caption": "A"},
        {"image_id": 9, "caption": "B"},
        {"image_id": 7, "caption": "C"},
    ]
    tree = put(
        tmp_path,
        {
            "annotations/captions_val2017.json": {
                "images": [{"id": 7, "file_name": "seven.jpg"}],
                "annotations": annotations,
            },
            "val2017/seven.jpg": 3,
            "images/000000000009.jpg": 4,
        },
    )
    data = opened("coco-caption", tree)
    assert data.split == "val"
    assert [(one.id, one.answers) for one in data.samples()] == [(7, ("A", "C")), (9, ("B",))]
    names = [sample.pictures[0].picture.name for sample in data.samples()]
    assert names == ["val2017/seven.jpg", "images/000000000009.jpg"]


def test_a_caption_of_several_is_drawn_by_seed_and_epoch(tmp_path: Path) -> None:
    captions = [f"caption {number}" for number in range(50)]
    tree = put(
        tmp_path, {"coco_karpathy_train.json": [{"image": FIRST, "caption": captions}], FIRST: 1}
    )

    def drawn(seed: int, epoch: int) -> Any:
        return shown(opened("coco-caption", tree, seed=seed).sample(0, epoch))[-1]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({str(drawn(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("name", ["flickr30k", "nocaps"])
def test_sets_of_cocos_form(name: str, tmp_path: Path) -> None:
    file = {
        "flickr30k": "test1k.token.coco_format",
        "nocaps": "nocaps_val_4500_captions.json",
    }[name]
    images = {"flickr30k": "flickr30k-images", "nocaps": "images"}[name]
    tree = put(
        tmp_path,
        {
            file: {
                "images": [{"id": 5, "file_name": "p5.jpg", "domain": "in-domain"}],
                "annotations": [
                    {"image_id": 5, "caption": "A goat."},
                    {"image_id": 5, "caption": "B goat."},
                    {"image_id": 6, "caption": "of a picture that is not named"},
                ],
            },
            f"{images}/p5.jpg": 1,
        },
    )
    data = opened(name, tree)
    sample, other = data.samples()
    assert other.pictures[0].picture.name.endswith("/6.jpg")
    assert sample.answers == ("A goat.", "B goat.") and sample.about == {"domain": "in-domain"}
    assert shown(sample)[:2] == [f"<{images}/p5.jpg>", "a photo of"]
    assert shown(sample)[2] in ([" a goat."], [" b goat."])


@pytest.mark.parametrize("form", ["paragraphs_v1.json", "paragraphs_coco.json"])
def test_paragraphs_of_a_split(form: str, tmp_path: Path) -> None:
    text = "paragraph" if form == "paragraphs_v1.json" else "caption"
    entries = [
        {"image_id": number, "url": f"https://x/rak/VG_100K_2/{number}.jpg", text: "The image."}
        for number in (77, 78)
    ]
    tree = put(
        tmp_path,
        {
            form: entries if text == "paragraph" else {"annotations": entries},
            "test_split.json": [78],
            "images/VG_100K_2/78.jpg": 4,
        },
    )
    (sample,) = opened("image2paragraph", tree, split="test").samples()
    assert shown(sample) == [
        "<images/VG_100K_2/78.jpg>",
        "Please describe the image in detail. The image depicts",
        [" The image."],
    ]
    with pytest.raises(MmiError, match="lacks val_split.json"):
        opened("image2paragraph", tree, split="val")


def test_textcaps(tmp_path: Path) -> None:
    data = [
        {"image_id": "ab", "caption_str": "A Sign", "reference_strs": ["A Sign", "B"]},
        {"image_id": "ab", "caption_str": ""},
    ]
    tree = put(tmp_path, {"TextCaps_0.1_train.json": {"data": data}, "train_images/ab.jpg": 2})
    found = opened("textcaps", tree)
    assert [shown(one) for one in found.samples()] == [["<train_images/ab.jpg>", SFT, [" a sign"]]]
    assert found.skipped == {"caption is empty": 1}


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    tree = karpathy(tmp_path / "coco")
    (tree / "val2014").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tree / "val2014")
    assert opened("coco-caption", tree).sample(0).pictures[0].picture.load().shape == (8, 12, 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"images": ', "is not whole JSON"),
        ({"info": {}}, "is not what the data set publishes"),
        (b"\xff\xfe\x00", "is not whole JSON"),
    ],
)
def test_files_that_are_not_those_of_the_set(content: Any, said: str, tmp_path: Path) -> None:
    tree = put(tmp_path, {"coco_karpathy_train.json": content})
    with pytest.raises(DocumentError, match=said):
        opened("coco-caption", tree)


def test_what_is_missing_is_named_with_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["data", "check", "coco-caption", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lacks coco_karpathy_train.json" in line and "Get it from cocodataset.org" in line
    assert run(["data", "check", "coco-caption", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert run(["data", "check", "coco-captoin", str(tmp_path)]) == 2
    assert "The nearest is coco-caption" in capsys.readouterr().err
    assert run(["data", "check", "coco-caption", str(tmp_path), "--split", "dev"]) == 2
    assert "has no split dev" in capsys.readouterr().err
    assert run(["data", "check", "coco-caption", str(tmp_path), "--prompt", "captoin"]) == 2
    assert "The nearest is caption" in capsys.readouterr().err


def test_a_text_without_blanks_is_drawn_and_the_first_of_each_reason_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten million letters on the contact sheet; what is dropped at opening has a place."""
    data = [
        {"image_id": "ab", "caption_str": "x" * 10_000_000},
        {"image_id": "cd", "caption_str": ""},
    ]
    tree = put(tmp_path, {"TextCaps_0.1_train.json": {"data": data}, "train_images/ab.jpg": 2})
    sheet = tmp_path / "sheet.png"
    words = ["data", "check", "textcaps", str(tree), "--sheet", str(sheet), "--show", "1"]
    begun = time.process_time()
    assert run([*words, "--json"]) == 0
    assert time.process_time() - begun < 10 and sheet.is_file()
    capsys.readouterr()
    assert run([*words[:4], "--show", "0"]) == 0
    assert "record 1 of" in " ".join(capsys.readouterr().out.split())
