"""Referring expressions: lines and pickles, boxes, mirrored sentences; pickles with code."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmi_deploy.errors import DocumentError
from mmi_train.data.readers.refer import box_text, mirrored_box, swapped
from mmi_train.data.readers.restricted_pickle import read_npy, read_pickle
from train.data.readers.trees import checked, lines, npy, opened, put, shown

REGION = "Provide the bounding box coordinate of the region this sentence describes"
NAME = "COCO_train2014_000000581857.jpg"


def line(**more: Any) -> dict[str, Any]:
    entry = {"image": f"train2014/{NAME}", "sent": "the left one", "bbox": [16.0, 2, 33, 31]}
    return entry | {"width": 64, "height": 48} | more


def test_lines_of_regions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = lines(
        line(),
        line(bbox=[1, 2, 3]),
        line(bbox=[50, 2, 33, 31]),
        line(bbox=[0, 0, 640, 480]),
        line(image="train2014/none.jpg"),
    )
    tree = put(tmp_path, {"refcoco_train.jsonl": content, f"images/train2014/{NAME}": 1})
    found = checked("refcoco", tree, capsys, "--show", "1")
    assert found["samples"] == 1
    assert found["skipped"] == {
        "box is not within the picture": 2,
        "entry is malformed": 1,
        "picture is missing": 1,
    }
    assert found["documents"] == [
        {
            "parts": [
                {"image": f"images/train2014/{NAME}", "box": [16.0, 2, 33, 31]},
                {"text": f"{REGION}. the left one<box>", "learn": False},
                {"text": "(249,041)(515,645)</box>", "learn": True},
            ],
            "answers": ["(249,041)(515,645)"],
        }
    ]
    sample = opened("refcoco", tree).sample(0)
    assert sample.about == {"bbox": [16.0, 2, 33, 31], "width": 64, "height": 48}
    assert sample.pictures[0].fit == "squash"
    other = opened("refcoco", tree, prompt="rec-appendix").sample(0)
    assert shown(other)[1:] == [
        f"Question: {REGION}: the left one, Answer:",
        [" (249,041)(515,645)"],
    ]


@pytest.mark.parametrize("name", ["refcoco+_val.jsonl", "refcoco%2B_val.jsonl"])
def test_the_plus_may_be_coded(name: str, tmp_path: Path) -> None:
    assert len(opened("refcoco+", put(tmp_path, {name: lines(line())}))) == 1


def refs(**more: Any) -> list[dict[str, Any]]:
    sentences = [
        {"raw": "A", "sent": "the cat", "tokens": ["the", "cat"], "sent_id": 5},
        {"raw": "B", "sent": "a cat", "tokens": ["a", "cat"], "sent_id": 6},
    ]
    ref = {"ref_id": 1, "ann_id": 11, "image_id": 21, "split": "testA", "sentences": sentences}
    return [ref | more, ref | {"split": "train"}, ref | {"ann_id": 12}]


@pytest.mark.parametrize("inner", ["", "refcoco/"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_official_pickle(inner: str, protocol: int, tmp_path: Path) -> None:
    tree = put(
        tmp_path,
        {
            f"{inner}refs(unc).p": pickle.dumps(refs(), protocol),
            f"{inner}instances.json": {
                "images": [{"id": 21, "file_name": NAME, "width": 100, "height": 50}],
                "annotations": [{"id": 11, "image_id": 21, "bbox": [10.0, 5.0, 40.0, 20.0]}],
            },
            f"train2014/{NAME}": 1,
        },
    )
    data = opened("refcoco", tree, split="testA")
    assert [one.id for one in data.samples()] == [5, 6]
    assert data.sample(0).about["bbox"] == [10, 5, 50, 25]
    assert data.sample(0).answers == ("(099,099)(499,499)",)
    assert data.skipped == {"region is not in instances.json": 1}


class _Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/mmi_code_of_a_pickle_ran",)


@pytest.mark.parametrize("value", [_Code(), [{"sentences": _Code()}], {1: np.array([_Code()])}])
def test_a_pickle_with_code_is_refused_and_not_run(value: Any, tmp_path: Path) -> None:
    tree = put(tmp_path, {"refs(unc).p": pickle.dumps(value), "instances.json": {}})
    with pytest.raises(DocumentError, match=r"posix.mkdir; it is code, and was not run"):
        opened("refcoco", tree)
    with pytest.raises(DocumentError, match="it is code"):
        path = put(tmp_path, {"a.npy": npy(np.array([value], object))}) / "a.npy"
        read_npy(path)
    assert not Path("/tmp/mmi_code_of_a_pickle_ran").exists()


def test_data_of_numpy_is_read(tmp_path: Path) -> None:
    values = {"a": np.array(["x", [1, 2], {"y": b"\xff"}], object), "b": np.float32(2.5), "c": {3}}
    for protocol in (2, 4):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(values, protocol))
        found = read_pickle(tmp_path / "a.pkl")
        assert found["a"].tolist() == values["a"].tolist()  # type: ignore[attr-defined]
        assert (found["b"], found["c"]) == (2.5, {3})
    for array in (np.array({"k": ["t"]}, object), np.array(["a", "b"]), np.arange(3)):
        (tmp_path / "a.npy").write_bytes(npy(array))
        assert read_npy(tmp_path / "a.npy").tolist() == array.tolist()


def test_a_pickle_that_names_a_far_entry_of_its_memo_costs_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x80\x04]r\xff\xff\xff\x7f.")
    tracemalloc.start()
    try:
        assert read_pickle(tmp_path / "a") == []
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04]\x94(", b"\x80\x63."])
def test_damaged_pickles_and_arrays(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DocumentError, match="is damaged"):
        read_pickle(tmp_path / "a")
    with pytest.raises(DocumentError, match="is not an .npy file"):
        read_npy(tmp_path / "a")
    with pytest.raises(DocumentError, match="cannot read"):
        read_pickle(tmp_path)


def test_boxes_are_cut_off_to_thousandths() -> None:
    assert box_text((1.5, 2, 57, 45), 64, 48) == "(023,041)(889,936)"
    assert box_text((0, 0, 64, 48), 64, 48, digits=1) == "(0,0)(999,999)"
    assert mirrored_box((16, 2, 33, 31), 64) == (31, 2, 48, 31)


def test_sides_are_swapped_as_words() -> None:
    assert swapped("Left LEFT right bright one") == "Right RIGHT left bright one"
    assert swapped("bright left", published_inside_words=True) == "bleft right"


def test_half_of_the_training_pictures_are_mirrored_with_their_boxes(tmp_path: Path) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[2:31, 16:33] = 200
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    tree = put(
        tmp_path, {"refcoco_train.jsonl": lines(line()), f"train2014/{NAME}": file.getvalue()}
    )
    data = opened("refcoco", tree, mirror=True)
    found = {}
    for epoch in range(40):
        sample = data.sample(0, epoch)
        (part,) = sample.pictures
        assert part.box is not None
        left, top, right, bottom = map(int, part.box)
        shown_there = part.picture.load()
        assert (shown_there[top:bottom, left:right] == 200).all()
        assert shown_there.sum() == pixels.sum()
        found[sample.answers] = found.get(sample.answers, 0) + 1
        assert ("right" in shown(sample)[1]) == (sample.answers == ("(483,041)(749,645)",))
    assert set(found) == {("(249,041)(515,645)",), ("(483,041)(749,645)",)}
    assert min(found.values()) > 8
    assert opened("refcoco", tree).sample(0).answers == ("(249,041)(515,645)",)
