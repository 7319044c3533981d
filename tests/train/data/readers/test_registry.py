"""Every name of a data set opens, and says what it lacks; damaged files end in one line."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmi_deploy.errors import MmiError
from mmi_train.data.readers.check import check_set
from mmi_train.data.readers.registry import DATA_SETS
from mmi_train.data.readers.restricted_pickle import read_npy
from train.data.readers.trees import lines, npy, opened, put

NAMES = """
    mmc4 laion-coco laion-en cc12m objects365 llava-665k coco-caption vqav2 chartqa docvqa infovqa
    stvqa estvqa textcaps llavar ocrvqa dvqa refcoco refcoco+ refcocog ade20k vist pororo
    flintstones flickr30k nocaps image2paragraph okvqa gqa vizwiz textvqa visdial coco-t2i ln-coco
""".split()


def test_all_sets_of_the_paper_have_a_name() -> None:
    assert list(DATA_SETS) == NAMES and len(NAMES) == 34


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_folder_lacks_a_file_with_a_source(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        MmiError, match=rf"lacks .* of the data set {name.replace('+', '.')}"
    ) as said:
        opened(name, tmp_path)
    assert "Get it from" in str(said.value) and "\n" not in str(said.value)


JUNK: list[Any] = [None, [], 5, -1, "x", 1.5, {"a": 1}, [[1]], "../x", float("inf"), 10**400]
JUNK += ["a_" + 5000 * "1" + ".jpg"]


def changed(value: Any) -> Iterator[Any]:
    """The value with every node replaced by junk in turn, and every entry left out in turn."""
    yield from JUNK
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            less = copy.copy(value)
            del less[key]
            yield less
            for other in changed(value[key]):
                more = copy.copy(value)
                more[key] = other
                yield more


INSTANCES = {
    "images": [{"id": 2, "file_name": "a.jpg", "width": 9, "height": 9}],
    "annotations": [{"id": 1, "bbox": [1, 2, 3, 4]}],
}
REF = {"ann_id": 1, "image_id": 2, "split": "train", "sentences": [{"sent": "a", "sent_id": 3}]}
SCENE = {"caption": "a", "image_id": "b", "sequence_index": 0}
TURN = {"question": 0, "answer": 0, "answer_options": [0], "gt_index": 0}
TREES: dict[str, dict[str, Any]] = {
    "refcocog": {"instances.json": INSTANCES, "refs(umd).p": [REF]},
    "coco-caption": {
        "captions_val2017.json": {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "annotations": [{"image_id": 1, "caption": "a"}],
        }
    },
    "textvqa": {
        "textvqa_val_questions.json": {
            "questions": [{"question_id": 1, "question": "q", "image_id": "a", "image": "a.jpg"}]
        },
        "textvqa_val_annotations.json": {
            "annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]
        },
    },
    "vist": {"val_formatted.json": {"annotations": {"1": [SCENE]}}},
    "visdial": {
        "visdial_1.0_train.json": {
            "data": {
                "questions": ["q"],
                "answers": ["a"],
                "dialogs": [{"image_id": 1, "caption": "c", "dialog": [TURN]}],
            }
        }
    },
    "flintstones": {
        "flintstones_annotations_v1-0.json": [{"globalID": "a", "description": "d"}],
        "train-val-test_split.json": {"train": ["a"], "val": [], "test": []},
        "following_cache4.pkl": {"a": ["a", "a", "a", "a"]},
    },
    "llava-665k": {
        "llava_v1_5_mix665k.json": [
            {
                "id": "1",
                "image": "a.jpg",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            }
        ]
    },
    "ocrvqa": {"dataset.json": {"1": {"questions": ["q"], "answers": ["a"], "split": 1}}},
    "laion-en": {"0.txt": [{"image": "a.jpg", "caption": "a caption of a picture"}]},
}


@pytest.mark.parametrize("name", TREES)
def test_damaged_entries_are_left_out_or_end_in_one_line(name: str, tmp_path: Path) -> None:
    def write(files: dict[str, Any]) -> None:
        for file, value in files.items():
            content: Any = json.dumps(value)
            if Path(file).suffix in (".p", ".pkl"):
                content = pickle.dumps(value)
            elif file.endswith(".txt"):
                content = lines(*value) if isinstance(value, list) else content
            put(tmp_path, {file: content})

    tree = TREES[name] | {}
    write(tree)
    put(tmp_path, {"a.jpg": 1})
    assert check_set(opened(name, tmp_path), 1, decode=False).name == name
    for file, value in tree.items():
        for other in changed(value):
            write({file: other})
            try:
                check_set(opened(name, tmp_path), 1, decode=False)
            except MmiError as error:
                assert "\n" not in str(error)
        write({file: value})


def test_a_damaged_header_of_an_array(tmp_path: Path) -> None:
    content = bytearray(npy(np.array([1, [2]], object)))
    for place in range(10, 80):
        damaged = bytes(content[:place]) + b"(" + bytes(content[place + 1 :])
        put(tmp_path, {"a.npy": damaged})
        try:
            read_npy(tmp_path / "a.npy")
        except MmiError as error:
            assert "a.npy" in str(error)
